"""Loops over rows of numbers, compiled while the program runs, on all of torch's threads.

The library has the passes of `kernels.py` only as several, each through memory. A `Kernel` writes one as LLVM's
intermediate language, sixteen numbers at a time; llvmlite (LLVM in a wheel, no compiler on the machine) makes it
machine code in some hundredths of a second, and torch's own OpenMP pool runs it, so that no thread is in another's way.

    k = Kernel("scale")
    x, factor, width = k.pointer(), k.number(), k.integer()
    with k.rows() as row:
        with k.loop(width, LANES) as i:
            at = row * width + i
            k.store(x, at, k.load(x, at) * factor)
    scale = k.compiled()
    scale(len(x_MN), x_MN, 0.5, x_MN.shape[1])                  # rows, then the parameters in their order

Rows are independent of each other and of the number of threads: the same input gives the same bytes.
Linux on x86 with AVX-512 and bfloat16 instructions only; `available` says whether, and everything that uses kernels
has the library's way beside it.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LANES = 16
"""Numbers of a vector: 512 bits of float32."""

F32, I32, BF16, I8 = (f"<{LANES} x {t}>" for t in ("float", "i32", "bfloat", "i8"))
PAIRS = f"<{2 * LANES} x bfloat>"
_FAST = "reassoc nsz arcp contract"
"""What LLVM may do to sums and products; infinities and NaNs stay what they are."""


@dataclass(frozen=True)
class Value:
    """A number or a vector of LANES numbers within a kernel, of an LLVM type."""

    kernel: Kernel
    type: str
    ref: str

    def __add__(self, other: Operand) -> Value:
        return self._binary("add", other)

    def __sub__(self, other: Operand) -> Value:
        return self._binary("sub", other)

    def __mul__(self, other: Operand) -> Value:
        return self._binary("mul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self._binary("div", other)

    def __rsub__(self, other: Operand) -> Value:
        return self.kernel.constant(other, self.type)._binary("sub", self)

    def __rtruediv__(self, other: Operand) -> Value:
        return self.kernel.constant(other, self.type)._binary("div", self)

    def __mod__(self, other: Operand) -> Value:
        """Of integers that are not negative."""
        return self._binary("rem", other)

    __radd__, __rmul__ = __add__, __mul__

    def _binary(self, what: str, other: Operand) -> Value:
        k = self.kernel
        a, b = self, k.constant(other, self.type) if not isinstance(other, Value) else other
        if a.type != b.type:  # one of them is a scalar
            a, b = (k.splat(v) if not v.type.startswith("<") else v for v in (a, b))
        is_float = "float" in a.type
        op = f"f{what} {_FAST}" if is_float else {"div": "udiv", "rem": "urem"}.get(what, what)
        return k.emit(a.type, f"{op} {a.type} {a.ref}, {b.ref}")

    def bits(self, what: str, other: int) -> Value:
        """`and`, `xor`, `shl`, `lshr`, `ashr` with a constant."""
        right = self.kernel.constant(other, self.type)
        return self.kernel.emit(self.type, f"{what} {self.type} {self.ref}, {right.ref}")

    def to_float(self) -> Value:
        return self.cast("sitofp", "float")

    def cast(self, how: str, to: str) -> Value:
        return self.kernel.emit(to, f"{how} {self.type} {self.ref} to {to}")


Operand = Value | float | int


class Variable:
    """A value that loops change."""

    def __init__(self, start: Value) -> None:
        self.kernel, self.type = start.kernel, start.type
        self._place = self.kernel.reserve(self.type)
        self.set(start)

    def get(self) -> Value:
        return self.kernel.emit(self.type, f"load {self.type}, ptr {self._place}")

    def set(self, value: Value) -> None:
        self.kernel.line(f"store {self.type} {value.ref}, ptr {self._place}")


class Kernel:
    """Writes one function. Parameters are declared first, in the order in which the call will give them."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}_{next(_NUMBERS)}"
        self._entry: list[str] = []
        self._body: list[str] = []
        self._kinds: list[str] = []
        self._count = 0

    # ---------------------------------------------------------------- writing

    def line(self, text: str) -> None:
        self._body.append(text)

    def emit(self, type_: str, text: str) -> Value:
        ref = self._name("v")
        self.line(f"{ref} = {text}")
        return Value(self, type_, ref)

    def reserve(self, type_: str, count: int = 1) -> str:
        """Room on the stack of every thread."""
        ref = self._name("room")
        self._entry.append(f"{ref} = alloca {type_}, i64 {count}, align 64")
        return ref

    def constant(self, value: Operand, type_: str) -> Value:
        if isinstance(value, Value):
            return value
        is_vector, is_float = type_.startswith("<"), "float" in type_
        one = f"0x{struct.pack('>d', _as_float32(value)).hex()}" if is_float else str(int(value))
        element = type_.split()[-1].rstrip(">")
        text = "<" + ", ".join([f"{element} {one}"] * LANES) + ">" if is_vector else one
        return Value(self, type_, text)

    def splat(self, scalar: Value) -> Value:
        vector = f"<{LANES} x {scalar.type}>"
        first = self.emit(vector, f"insertelement {vector} poison, {scalar.type} {scalar.ref}, i32 0")
        return self.emit(
            vector, f"shufflevector {vector} {first.ref}, {vector} poison, <{LANES} x i32> zeroinitializer"
        )

    def zeros(self) -> Value:
        return self.constant(0.0, F32)

    # ---------------------------------------------------------------- parameters

    def pointer(self) -> Value:
        return self._parameter("ptr")

    def integer(self) -> Value:
        return self._parameter("i64")

    def number(self) -> Value:
        return self._parameter("float")

    def _parameter(self, type_: str) -> Value:
        ref = self._name("p")
        slot = f"{ref}.slot"
        self._kinds.append(type_)
        self._entry.append(f"{slot} = getelementptr i64, ptr %args, i64 {len(self._kinds)}")
        self._entry.append(f"{ref} = load {type_}, ptr {slot}")
        return Value(self, type_, ref)

    # ---------------------------------------------------------------- loops

    @contextmanager
    def rows(self) -> Iterator[Value]:
        """This thread's share of the rows; the outermost loop. `n_rows` are all, `first_row` this thread's first."""
        thread, threads = (
            self.emit("i32", f"call i32 @omp_get_{what}()").cast("sext", "i64")
            for what in ("thread_num", "num_threads")
        )
        n = self.n_rows = self.emit("i64", "load i64, ptr %args")
        self.first_row = n * thread / threads
        with self.between(self.first_row, n * (thread + 1) / threads, 1) as row:
            yield row

    @contextmanager
    def between(self, start: Value, stop: Value, step: int) -> Iterator[Value]:
        counter = Variable(start)
        head, body, end = (self._name(n)[1:] for n in ("head", "body", "end"))
        self.line(f"br label %{head}")
        self.line(f"{head}:")
        at = counter.get()
        more = self.emit("i1", f"icmp slt i64 {at.ref}, {stop.ref}")
        self.line(f"br i1 {more.ref}, label %{body}, label %{end}")
        self.line(f"{body}:")
        yield at
        counter.set(at + step)
        self.line(f"br label %{head}")
        self.line(f"{end}:")

    def loop(self, stop: Value | int, step: int = LANES) -> Any:
        stop = self.constant(stop, "i64")
        return self.between(self.constant(0, "i64"), stop, step)

    # ---------------------------------------------------------------- memory

    def load(self, base: Value | str, at: Operand, kind: str = "float") -> Value:
        """LANES numbers from element `at` on, as float32: `float`, `bfloat` or `i8`; `i32` as they are."""
        raw = self.emit(
            f"<{LANES} x {kind}>", f"load <{LANES} x {kind}>, ptr {self._address(base, at, kind)}, align 1"
        )
        if kind == "bfloat":
            return raw.cast("fpext", F32)
        return raw.cast("sitofp", F32) if kind == "i8" else raw

    def load_one(self, base: Value | str, at: Operand, kind: str = "float") -> Value:
        return self.emit(kind, f"load {kind}, ptr {self._address(base, at, kind)}, align 1")

    def load_pairs(self, base: Value | str, at: Operand) -> Value:
        """LANES / 2 float32 from element `at` on, each twice."""
        half = f"<{LANES // 2} x float>"
        raw = self.emit(half, f"load {half}, ptr {self._address(base, at, 'float')}, align 1")
        return self._shuffled(raw, [i // 2 for i in range(LANES)])

    def load_bfloats(self, base: Value | str, at: Operand) -> Value:
        """2 LANES bfloat16 from element `at` on, as they are: for `add_products`."""
        return self.emit(PAIRS, f"load {PAIRS}, ptr {self._address(base, at, 'bfloat')}, align 1")

    def swapped(self, a: Value) -> Value:
        """Numbers 2i and 2i + 1 in each other's place."""
        return self._shuffled(a, [i ^ 1 for i in range(LANES)])

    def _shuffled(self, a: Value, order: list[int]) -> Value:
        mask = "<" + ", ".join(f"i32 {i}" for i in order) + ">"
        return self.emit(F32, f"shufflevector {a.type} {a.ref}, {a.type} poison, <{LANES} x i32> {mask}")

    def alternating(self, even: float, odd: float) -> Value:
        numbers = (f"float 0x{struct.pack('>d', _as_float32(v)).hex()}" for v in (even, odd) * (LANES // 2))
        return Value(self, F32, "<" + ", ".join(numbers) + ">")

    def store(self, base: Value | str, at: Operand, value: Value, kind: str = "float") -> None:
        """As `kind`: `float`, or `bfloat` (rounded), or as it is."""
        if kind == "bfloat":
            value = value.cast("fptrunc", BF16)
        self.line(f"store {value.type} {value.ref}, ptr {self._address(base, at, kind)}, align 1")

    def prefetch(self, base: Value, at: Operand, kind: str = "float") -> None:
        """Let element `at` come to the second-level cache meanwhile."""
        self.line(f"call void @llvm.prefetch.p0(ptr {self._address(base, at, kind)}, i32 0, i32 2, i32 1)")

    def _address(self, base: Value | str, at: Operand, kind: str) -> str:
        at = self.constant(at, "i64")
        start = base if isinstance(base, str) else base.ref
        return self.emit("ptr", f"getelementptr {kind}, ptr {start}, i64 {at.ref}").ref

    # ---------------------------------------------------------------- functions

    def maximum(self, a: Value, b: Operand) -> Value:
        other = self.constant(b, a.type)
        truth = f"<{LANES} x i1>" if a.type == F32 else "i1"
        larger = self.emit(truth, f"fcmp ogt {a.type} {a.ref}, {other.ref}")
        return self.emit(a.type, f"select {larger.type} {larger.ref}, {a.type} {a.ref}, {a.type} {other.ref}")

    def smaller(self, a: Value, b: Value) -> Value:
        """Of integers."""
        less = self.emit("i1", f"icmp slt {a.type} {a.ref}, {b.ref}")
        return self.emit(a.type, f"select i1 {less.ref}, {a.type} {a.ref}, {b.type} {b.ref}")

    def add_dots(self, sums: Value, unsigned: Value, signed: Value) -> Value:
        """int32 sums, each plus the product of four unsigned with four signed bytes."""
        operands = ", ".join(f"{I32} {v.ref}" for v in (sums, unsigned, signed))
        return self.emit(I32, f"call {I32} @llvm.x86.avx512.vpdpbusd.512({operands})")

    def call(self, name: str, a: Value) -> Value:
        """`fabs` of a vector, `sqrt` of a number."""
        short = f"v{LANES}f32" if a.type == F32 else "f32"
        return self.emit(a.type, f"call {a.type} @llvm.{name}.{short}({a.type} {a.ref})")

    def sum(self, a: Value) -> Value:
        return self.emit(
            "float", f"call reassoc float @llvm.vector.reduce.fadd.v{LANES}f32(float 0.0, {F32} {a.ref})"
        )

    def add_products(self, sums: Value, a: Value, b: Value) -> Value:
        """float32 sums plus the products of pairs of bfloat16: numbers 2i and 2i + 1 go into sum i."""
        return self.emit(
            F32,
            f"call {F32} @llvm.x86.avx512bf16.dpbf16ps.512({F32} {sums.ref}, {PAIRS} {a.ref}, {PAIRS} {b.ref})",
        )

    def largest(self, a: Value) -> Value:
        return self.emit("float", f"call nnan float @llvm.vector.reduce.fmax.v{LANES}f32({F32} {a.ref})")

    def nearest(self, a: Value) -> Value:
        """Of |a| < 4 million, the nearest integers (even ones at half), int32: the low bits of a + 1.5 * 2^23."""
        shifted = self.emit(F32, f"fadd {F32} {a.ref}, {self.constant(12582912.0, F32).ref}")
        return shifted.cast("bitcast", I32)

    def low_bytes(self, a: Value) -> Value:
        """The low eight bits of int32."""
        return a.cast("trunc", I8)

    def exp2(self, x: Value) -> Value:
        """2^x to a relative error of 2e-7, and what x lacks in precision."""
        rest = f"{F32} zeroinitializer, i16 -1, i32 4)"  # all lanes, the current rounding
        f = self.emit(
            F32, f"call {F32} @llvm.x86.avx512.mask.reduce.ps.512({F32} {x.ref}, i32 1, {rest}"
        )  # x - floor(x)
        result = self.constant(_EXP2[0], F32)
        for c in _EXP2[1:]:
            result = result * f + c
        power = f"{F32} {result.ref}, {F32} {x.ref}, {rest}"  # result * 2^floor(x)
        return self.emit(F32, f"call {F32} @llvm.x86.avx512.mask.scalef.ps.512({power}")

    # ---------------------------------------------------------------- compiling

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"%{stem}{self._count}"

    @property
    def text(self) -> str:
        body = "\n".join([*self._entry, *self._body])
        return f"define void @{self.name}(ptr noalias %args) #0 {{\n{body}\nret void\n}}\n"

    def compiled(self) -> Compiled:
        """Its machine code. To be kept by the caller: it stays in memory in any case."""
        return Compiled(self.name, tuple(self._kinds), _machine_code(self.name, self.text))


_EXP2 = (1.8671300737e-3, 9.0170303118e-3, 5.5799913114e-2, 2.4016445015e-1, 6.9315131181e-1, 1.0)
"""Of 2^f on [0, 1), highest power first; relative error 1e-7, fitted with weights until it was even."""


def _as_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


class Compiled:
    """A kernel to be called."""

    def __init__(self, name: str, kinds: tuple[str, ...], address: int) -> None:
        self.name, self.kinds, self._address = name, kinds, address
        self._slots = ctypes.c_int64 * (1 + len(kinds))

    def __call__(self, n_rows: int, *values: Tensor | float | int | None, threads: int = 0) -> None:
        """Work through rows 0 to n_rows. Tensors are given by their memory; nobody checks their shapes.

        threads: at most; all of torch's unless given.
        """
        if len(values) != len(self.kinds):
            raise TypeError(f"{self.name} takes {len(self.kinds)} values, not {len(values)}")
        slots = self._slots(n_rows)
        for i, (kind, value) in enumerate(zip(self.kinds, values, strict=True), 1):
            if isinstance(value, Tensor):
                slots[i] = value.data_ptr()
            elif kind == "float":
                slots[i] = struct.unpack("I", struct.pack("f", value))[0]
            else:
                slots[i] = value or 0  # type: ignore[assignment]
        _openmp().GOMP_parallel(
            ctypes.c_void_p(self._address),
            ctypes.byref(slots),
            min(threads or torch.get_num_threads(), n_rows),
            0,
        )


@cache
def _openmp() -> Any:
    """torch's OpenMP library, GNU's; None if it is another."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    ours = sorted(loaded, key=lambda path: "torch" not in path)
    library = ctypes.CDLL(ours[0]) if ours else None
    return library if library is not None and hasattr(library, "GOMP_parallel") else None


@cache
def available() -> bool:
    """Whether kernels can be compiled and run here."""
    if not sys.platform.startswith("linux") or not torch.cpu._is_avx512_bf16_supported() or _openmp() is None:
        return False
    try:
        import llvmlite.binding  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _compiler() -> tuple[Any, Any, Any]:
    """Target machine, passes and engine. Engine and code live as long as the program."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(_openmp(), name), ctypes.c_void_p).value)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    return machine, passes, engine


_DECLARATIONS = f"""
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare {F32} @llvm.fabs.v16f32({F32})
declare {F32} @llvm.x86.avx512.mask.reduce.ps.512({F32}, i32 immarg, {F32}, i16, i32 immarg)
declare {F32} @llvm.x86.avx512.mask.scalef.ps.512({F32}, {F32}, {F32}, i16, i32 immarg)
declare {F32} @llvm.x86.avx512bf16.dpbf16ps.512({F32}, {PAIRS}, {PAIRS})
declare {I32} @llvm.x86.avx512.vpdpbusd.512({I32}, {I32}, {I32})
declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)
declare float @llvm.sqrt.f32(float)
declare float @llvm.vector.reduce.fadd.v16f32(float, {F32})
declare float @llvm.vector.reduce.fmax.v16f32({F32})
attributes #0 = {{ nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }}
"""


def _machine_code(name: str, text: str) -> int:
    import llvmlite.binding as llvm

    with _ONE_AT_A_TIME:
        machine, passes, engine = _compiler()
        module = llvm.parse_assembly(f'target triple = "{machine.triple}"\n{_DECLARATIONS}{text}')
        module.verify()
        passes.getModulePassManager().run(module, passes)
        engine.add_module(module)
        engine.finalize_object()
        return int(engine.get_function_address(name))


_ONE_AT_A_TIME = threading.Lock()
_NUMBERS = itertools.count()
"""Two threads may write the same kernel at the same time, and names are of the whole program."""
