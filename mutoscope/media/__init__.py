"""Reading and writing pictures and clips (PyAV, Pillow). Torch-free.

frames.py   resize, sample, compare: pure functions on arrays
read.py     probe, read_image, read_clip, iter_frames
write.py    VideoWriter, write_image, read_metadata
"""
