"""Measurements: kernels, their machine code and training speed, compared with other programs."""

if "." not in __name__:
    raise ModuleNotFoundError(
        "this folder is part of the package 'tritium': "
        "write 'import tritium.bench', not 'import bench'",
        name=__name__,
    )
