"""Makes an exception of a panic: a bug that ended a call into a Rust library.

The bindings (PyO3) raise `PanicException`, which is a `BaseException`, so that `except Exception`
lets it pass. Each Rust library has a class of its own, which cannot be imported.
"""


class LibraryPanicked(Exception):
    """A call into a Rust library ended with a panic. The library can be called again."""


def exception_of(error: BaseException) -> Exception:
    """`error` itself, or what stands for a panic; raises it if it is neither.

    For borders that catch `BaseException`: the end of the process and cancellations pass.
    """
    if isinstance(error, Exception):
        return error
    if type(error).__name__ != "PanicException":
        try:
            raise error
        finally:
            del error  # its traceback holds this frame, which would hold it
    return LibraryPanicked(f"a library failed: {error}")
