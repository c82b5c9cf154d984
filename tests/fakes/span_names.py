"""What the classes of `kagami_proto.span_names` list."""


def names_of(names: type) -> frozenset[str]:
    """The value of every constant of such a class."""
    return frozenset(value for name, value in vars(names).items() if name.isupper())
