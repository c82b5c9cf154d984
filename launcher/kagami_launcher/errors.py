"""The ways in which a launch ends early."""

from kagami_launcher.cli import debug_text


class LaunchFailed(Exception):
    """The launcher ends with exit code 1 and one line, TGI's `Error: {Variant}("{text}")`."""

    def __init__(self, variant: str, text: str = "") -> None:
        super().__init__(f"{variant}({debug_text(text)})" if text else variant)


class NotSupported(LaunchFailed):
    """A flag asks for something that this version cannot do."""

    def __init__(self, what: str) -> None:
        super().__init__("ArgumentValidation", f"{what} is not supported yet")


class Stopped(Exception):
    """A stop signal came while something was being started or awaited."""
