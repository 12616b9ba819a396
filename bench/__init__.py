"""bench"""

if "." not in __name__:
    raise ImportError("this folder is part of the package 'tritium': write 'import tritium.bench', not 'import bench'")
