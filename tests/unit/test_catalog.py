"""The table of known models, and model.toml: every mistake in it gets a sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mutoscope import catalog
from mutoscope.catalog import (
    OFFICIAL_NEGATIVE_PROMPT,
    default_models_dir,
    find_model,
    installed_models,
    known_model,
    known_models,
    parse_name,
)
from mutoscope.errors import FileError, RequestError
from mutoscope.manifest import (
    Defaults,
    Limits,
    ModelFile,
    ModelFiles,
    ModelManifest,
    NamedLora,
    read_manifest,
    write_manifest,
)

DOCS = Path(__file__).parents[2] / "docs" / "models.md"

TOML = """
name = "mine"
title = "My model"
sizes = [[64, 64], [96, 64]]

[files]
dit = "dit.gguf"
text_encoder = "umt5.gguf"
vae = "vae.gguf"

[defaults]
steps = 20
guidance = 4
shift = 5.5
sampler = "unipc"
width = 64
height = 64
frames = 17
fps = 8
"""


def make(folder: Path, text: str = TOML) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dit", "umt5", "vae"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")
    path = folder / "model.toml"
    path.write_text(text, encoding="utf-8")
    return path


# -- known models --------------------------------------------------------------------------------------------


def test_names() -> None:
    assert parse_name("wan2.1-vace-14b:q4_k_m") == ("wan2.1-vace-14b", "q4_k_m")
    assert parse_name(" Wan2.1-VACE-14B:Q4_K_M ") == ("wan2.1-vace-14b", "q4_k_m")
    assert parse_name("wan2.1-vace-14b") == ("wan2.1-vace-14b", "q4_k_m")
    assert parse_name("wan2.1-vace-1.3b") == ("wan2.1-vace-1.3b", "q8_0")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wan2.1-vac-14b", r"unknown model 'wan2\.1-vac-14b'\. Did you mean wan2\.1-vace-14b"),
        ("zzz", r"unknown model 'zzz'\. Known: wan2\.1-vace-14b, "),
        ("wan2.1-vace-14b:q4km", r"wan2\.1-vace-14b has no 'q4km'\. Did you mean q4_k_m .*Known: q3_k_s, "),
        ("wan2.1-vace-14b:zz", r"has no 'zz'\. Known:"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        parse_name(name)


def test_file_names_follow_the_repositories() -> None:
    """As read on the hub and in public programs, see docs/models.md."""
    expected = {
        "wan2.1-vace-14b:q4_k_m": ("QuantStack/Wan2.1_14B_VACE-GGUF", "Wan2.1_14B_VACE-Q4_K_M.gguf"),
        "wan2.1-vace-14b:q8_0": ("QuantStack/Wan2.1_14B_VACE-GGUF", "Wan2.1_14B_VACE-Q8_0.gguf"),
        "wan2.1-vace-1.3b:q8_0": ("calcuis/wan-1.3b-gguf", "wan2.1-vace-1.3b-q8_0.gguf"),
        "wan2.1-t2v-14b:q5_k_s": ("city96/Wan2.1-T2V-14B-gguf", "wan2.1-t2v-14b-Q5_K_S.gguf"),
        "wan2.1-t2v-1.3b:q8_0": ("samuelchristlie/Wan2.1-T2V-1.3B-GGUF", "Wan2.1-T2V-1.3B-Q8_0.gguf"),
    }
    for name, (repo, path) in expected.items():
        dit = known_model(name).files["dit"]
        assert (dit.repo, dit.path) == (repo, path)
    q4 = known_model("wan2.1-vace-14b").files
    assert (q4["text_encoder"].repo, q4["text_encoder"].path) == (
        "city96/umt5-xxl-encoder-gguf",
        "umt5-xxl-encoder-Q5_K_M.gguf",
    )
    assert (q4["vae"].repo, q4["vae"].path) == (
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
        "split_files/vae/wan_2.1_vae.safetensors",
    )


def test_every_set_is_complete_and_plausible() -> None:
    names = [m.name for m in known_models()]
    assert len(names) == len(set(names)) > 25
    for model in known_models():
        assert model == known_model(model.name)
        assert set(model.files) == {"dit", "text_encoder", "vae"}
        assert model.licence == "Apache-2.0"
        assert model.defaults.frames % 4 == 1
        assert (model.defaults.width, model.defaults.height) in model.sizes
        assert all(w % 16 == h % 16 == 0 for w, h in model.sizes)
        assert model.defaults.negative_prompt == OFFICIAL_NEGATIVE_PROMPT
        biggest = max(f.size_bytes for f in model.files.values())
        assert biggest <= model.memory_bytes() < biggest + 10e9
        assert model.memory_bytes(1280, 720) >= model.memory_bytes()
        # bits per weight between 3 and 17
        weights = {"wan2.1-vace-14b": 17.338e9, "wan2.1-vace-1.3b": 2.154e9}
        weights |= {"wan2.1-t2v-14b": 14.288e9, "wan2.1-t2v-1.3b": 1.419e9}
        bits = model.files["dit"].size_bytes * 8 / weights[model.name.partition(":")[0]]
        quant = model.name.partition(":")[2]
        floor = 16 if quant.endswith("f16") else int(quant[1])
        assert floor * 0.99 < bits < floor + 2, model.name


def test_defaults_of_vace() -> None:
    d = known_model("wan2.1-vace-14b").defaults
    assert (d.steps, d.shift, d.guidance, d.sampler) == (50, 16.0, 5.0, "unipc")
    assert (d.width, d.height, d.frames, d.fps) == (832, 480, 81, 16.0)
    # of the text in wan/configs/shared_config.py, Wan-Video/Wan2.1 at 9737cba
    digest = hashlib.sha256(OFFICIAL_NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_the_page_lists_every_set_and_how_its_name_is_known() -> None:
    page = DOCS.read_text("utf-8")
    for model in known_models():
        dit = model.files["dit"]
        row = (
            f"| `{model.name}` | `{dit.repo}` | `{dit.path}` | {dit.evidence} "
            f"| {model.download_bytes / 1e9:.1f} GB | {model.memory_bytes() / 1e9:.1f} GB |"
        )
        assert row in page, f"docs/models.md lacks:\n{row}"
    rows = [line for line in page.splitlines() if line.startswith("| `wan")]
    assert len(rows) == len(known_models())


# -- model.toml ----------------------------------------------------------------------------------------------


def test_read(tmp_path: Path) -> None:
    model = read_manifest(make(tmp_path / "m"))
    assert (model.name, model.title, model.licence) == ("mine", "My model", "")
    assert model.sizes == ((64, 64), (96, 64))
    assert model.defaults.guidance == 4.0
    assert isinstance(model.defaults.guidance, float)
    assert model.defaults.negative_prompt == ""
    assert model.limits == Limits()
    assert model.files.dit.path == tmp_path / "m" / "dit.gguf"
    assert len(model.files.all()) == 3
    model.check_files()


def test_write_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "x"
    folder.mkdir(parents=True)
    elsewhere = ModelFile(path=tmp_path / "far away" / 'quote".gguf')
    model = ModelManifest(
        name="x:q8_0",
        title='Quotes " and \\ and \n lines \x7f',
        notes="球 🔴",
        files=ModelFiles(
            dit=ModelFile(path=folder / "sub" / "d.gguf", sha256="0" * 64, size_bytes=7, source="a/b@c/d"),
            text_encoder=ModelFile(path=tmp_path / "models" / "files" / "t.gguf"),
            vae=elsewhere,
            dit_extra=(
                ModelFile(path=folder / "vace.gguf"),
                ModelFile(path=folder / "more.gguf", size_bytes=1),
            ),
            vocabulary=ModelFile(path=folder / "words.json"),
            magnitudes=ModelFile(path=folder / "magnitudes.json"),
        ),
        defaults=known_model("wan2.1-vace-14b").defaults,
        sizes=((832, 480),),
        limits=Limits(max_frames=81),
        loras={
            "fast": NamedLora(
                file=ModelFile(path=folder / "f.safetensors", size_bytes=3), steps=4, guidance=1.0
            ),
            "a.b c": NamedLora(file=elsewhere, strength=0.5, shift=5.0, sampler="distill4"),
        },
    )
    write_manifest(model, folder / "model.toml")
    assert read_manifest(folder / "model.toml") == model
    text = (folder / "model.toml").read_text("utf-8")
    assert 'path = "sub/d.gguf"' in text
    assert 'path = "../files/t.gguf"' in text
    assert str(tmp_path / "far away") in text
    assert [p.name for p in folder.iterdir()] == ["model.toml"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("title =", "titel =", r"model\.toml: unknown key 'titel'\. Did you mean title\?"),
        ("steps =", "step =", r"\[defaults\]: unknown key 'step'\. Did you mean steps\?"),
        ("steps = 20", "", r"\[defaults\]: steps missing"),
        ("steps = 20", 'steps = "20"', r"\[defaults\]: steps is a text \('20'\), a whole number expected"),
        ("steps = 20", "steps = true", r"steps is true or false \(True\), a whole number expected"),
        ("steps = 20", "steps = 20.5", r"steps is a number \(20\.5\), a whole number expected"),
        ("steps = 20", "steps = 0", r"steps is 0, more than 0 expected"),
        ("frames = 17", "frames = 16", r"frames is 16, 4n\+1 expected"),
        ('sampler = "unipc"', "sampler = 3", r"sampler is a whole number \(3\), a text expected"),
        ('name = "mine"', "", "has no name"),
        ('name = "mine"', "name = 3", "name is a whole number"),
        ("[files]", "[file]", r"unknown key 'file'\. Did you mean files or"),
        ('dit = "dit.gguf"', "", r"\[files\]: dit missing"),
        ('dit = "dit.gguf"', "dit = 3", r"\[files\] dit: is a whole number \(3\), a path"),
        ('dit = "dit.gguf"', "dit = {}", "dit: has no path"),
        ('dit = "dit.gguf"', 'dit = {path = "d", size = 3}', "dit: unknown key 'size'"),
        ('dit = "dit.gguf"', 'dit = {path = "d", sha256 = "xyz"}', "sha256 is 'xyz', 64 hexadecimal digits"),
        ('dit = "dit.gguf"', 'dit = "dit.gguf"\ndit_extra = "x"', "dit_extra is a text"),
        ('dit = "dit.gguf"', 'dit = "../secret.gguf"', r"\.\./secret\.gguf leaves the model's folder"),
        ('dit = "dit.gguf"', 'dit = "a/../../secret"', "leaves the model's folder"),
        ('dit = "dit.gguf"', 'dit = "../files/../secret"', "leaves the model's folder"),
        ('dit = "dit.gguf"', 'dit = "..\\\\secret"', "leaves the model's folder"),
        ("sizes = [[64, 64], [96, 64]]", "sizes = [64, 64]", r"sizes is \[64, 64\], a list like"),
        ("sizes = [[64, 64], [96, 64]]", "sizes = [[64, 0]]", "sizes is"),
        ("sizes = [[64, 64], [96, 64]]", "limits = 3", r"\[limits\]: is a whole number"),
        ("[defaults]", "[limits]\nmax_frame = 3\n[defaults]", "Did you mean max_frames"),
        ("[files]", "[loras.x]\nstrength = 1\n[files]", r"\[loras\.x\]: has no file"),
        ("[files]", '[loras]\nx = "../x"\n[files]', r"\[loras\.x\] file: \.\./x leaves"),
        ("[files]", '[loras.x]\nfile = "x"\nstep = 3\n[files]', "Did you mean steps"),
        ("[files]", '[loras.x]\nfile = "x"\nsteps = 0\n[files]', "more than 0"),
        ('name = "mine"', 'name = "mine"\nloras = 3', "a table of tables"),
        ("[files]", "[files", "is not a readable TOML file"),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TOML
    path = make(tmp_path / "m", TOML.replace(old, new, 1))
    with pytest.raises(FileError, match=expected) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="not a readable TOML file"):
        read_manifest(path)
    with pytest.raises(FileError, match="no such file"):
        read_manifest(tmp_path / "model.toml")


def test_allowed_paths(tmp_path: Path) -> None:
    for written in ("sub/dit.gguf", "./dit.gguf", "../files/dit.gguf", str(tmp_path / "dit.gguf")):
        text = TOML.replace('"dit.gguf"', repr(written))
        got = read_manifest(make(tmp_path / "m", text)).files.dit.path
        assert got == Path(written) if Path(written).is_absolute() else got.name == "dit.gguf"
        assert ".." not in got.parts


# -- finding -------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUTOSCOPE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "models"
    make(folder / "mine")
    name = "wan2.1-vace-1.3b:q8_0"
    make(folder / "wan2.1-vace-1.3b-q8_0", TOML.replace("mine", name))
    return folder


def test_find(models: Path, tmp_path: Path) -> None:
    assert default_models_dir() == models
    for name in (
        "mine",
        "MINE",
        models / "mine",
        models / "mine" / "model.toml",
        str(models / "mine"),
    ):
        assert find_model(name).name == "mine"
    for name in (
        "wan2.1-vace-1.3b:q8_0",
        "wan2.1-vace-1.3b",
        "WAN2.1-VACE-1.3B:Q8_0",
        "wan2.1-vace-1.3b-q8_0",
    ):
        assert find_model(name).name == "wan2.1-vace-1.3b:q8_0"
    other = make(tmp_path / "other")
    assert find_model(other.parent).files.dit.path == tmp_path / "other" / "dit.gguf"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "wan2.1-vace-14b",
            r"wan2\.1-vace-14b:q4_k_m is not installed\. Run: mutoscope pull wan2\.1-vace-14b:q4_k_m",
        ),
        ("mien", r"no model 'mien', neither installed nor .*Did you mean mine"),
        ("poket", "Did you mean pocket"),
        ("qqqq", "Run: mutoscope models"),
    ],
)
def test_not_found(models: Path, name: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        find_model(name)


def test_paths_that_are_no_models(models: Path, tmp_path: Path) -> None:
    gguf = models / "mine" / "dit.gguf"
    with pytest.raises(FileError, match=r"dit\.gguf: is not a model\.toml\. Write one"):
        find_model(gguf)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty/model\.toml: no such file"):
        find_model(tmp_path / "empty")


def test_missing_and_changed_files(models: Path) -> None:
    (models / "mine" / "vae.gguf").unlink()
    with pytest.raises(FileError, match=r"model mine: .*vae\.gguf is missing\. Pull"):
        find_model("mine")
    make(models / "mine", TOML.replace('"dit.gguf"', '{path = "dit.gguf", size_bytes = 5}'))
    with pytest.raises(FileError, match=r"dit\.gguf has 4 bytes, 5 expected"):
        find_model("mine")


def test_installed_models_lists_broken_ones_with_their_problem(models: Path) -> None:
    make(models / "broken", "name = ")
    (models / "half").mkdir()  # no model.toml: not installed
    (models / "mine" / "vae.gguf").unlink()
    got = {m.name: m.problem for m in installed_models()}
    assert list(got) == ["broken", "mine", "wan2.1-vace-1.3b:q8_0"]
    assert "not a readable TOML" in got["broken"]
    assert "is missing" in got["mine"]
    assert got["wan2.1-vace-1.3b:q8_0"] == ""
    with pytest.raises(FileError, match="not a readable TOML"):
        find_model("broken")
    assert installed_models(models / "nowhere") == []


def test_models_dir_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MUTOSCOPE_HOME", raising=False)
    monkeypatch.setattr(catalog.platformdirs, "user_data_dir", lambda *a, **k: str(tmp_path / "data"))
    assert default_models_dir() == tmp_path / "data" / "models"
    assert not (tmp_path / "data").exists()


def test_pocket_is_the_packages_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(tmp_path / "package" / "pocket", TOML.replace("mine", "pocket"))
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "package" / "catalog.py"))
    assert find_model("pocket", tmp_path / "nowhere").name == "pocket"


def test_example_of_the_page_is_read(tmp_path: Path) -> None:
    text = DOCS.read_text("utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    path = tmp_path / "m" / "model.toml"
    path.parent.mkdir()
    path.write_text(example, encoding="utf-8")
    model = read_manifest(path)
    assert model.name == "my-wan"
    keys: dict[str, Any] = {**vars(Defaults(**vars(model.defaults))), **vars(Limits())}
    for key in (*keys, "dit_extra", "vocabulary", "sha256", "size_bytes", "source"):
        assert f"`{key}`" in text, f"docs/models.md does not describe {key}"
