"""How JSON is written, and the integer types of the requests.

TGI is written in Rust, and its clients know Rust's number types. Therefore the limits of its
integers are checked when a body is read, and a 32-bit float is printed with the fewest digits that
identify it.
"""

import math
from typing import Annotated

import msgspec
from msgspec import Meta

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
# 64 bits do not fit into a Meta limit; validation.py has the upper bound.
UInt64 = Annotated[int, Meta(ge=0)]
# OpenAI's seeds are signed; TGI's, up to 2**64 - 1, are taken as well.
Seed = Annotated[int, Meta(ge=-(2**63))]

# Reading a message takes some 25 us on the event loop; agents send a few hundred of them.
MAX_MESSAGES = 8192
FewMessages = Meta(max_length=MAX_MESSAGES)

encode = msgspec.json.Encoder().encode


def shortest(logprob: float) -> float | None:
    """The 64-bit float that prints with the fewest digits that name this 32-bit value.

    `-0.34` for 0x1.5c28f6p-2, not `-0.3400000035762787`. It takes 0.5 us for most logprobs. None
    for infinities and NaN, which JSON does not have.
    """
    if not math.isfinite(logprob):
        return None
    mantissa, exponent = math.frexp(logprob)
    # Half the distance to the next 32-bit value: a decimal that is nearer is read as this value.
    # Below a power of two the values are twice as dense.
    nearer = math.ldexp(1.0, exponent - (26 if mantissa in (0.5, -0.5) else 25))
    if -10 < logprob <= -0.1:
        # A whole number of up to 8 digits divided by a power of ten: both are exact, so the parser
        # of the client gets the same float.
        scale = 1e7 if logprob > -1 else 1e6
        for power in (scale, 10 * scale):
            rounded = round(logprob * power) / power
            if -nearer < rounded - logprob < nearer:
                return rounded
    for digits in ("%.7g", "%.8g"):
        rounded = float(digits % logprob)
        if -nearer < rounded - logprob < nearer:
            return rounded
    return float(f"{logprob:.9g}")
