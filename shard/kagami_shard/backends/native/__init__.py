"""The CPU's C++ library: its sources, its build, its Python side and its torch twins."""
