"""What a kernel call can answer instead of a result."""


class KernelInputError(ValueError):
    """The call itself is wrong: a shape, a dtype or a bound that no implementation could serve."""


class Unsupported(ValueError):
    """One implementation refuses one call; the message names the implementation and the reason."""
