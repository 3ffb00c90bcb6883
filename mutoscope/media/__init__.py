"""Reading and writing pictures and clips (PyAV, Pillow). Torch-free."""
