"""Kinds of values in the sections of a federation file."""

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=10_000_000)]
Positive = Annotated[int, Meta(ge=1, le=10_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
Duration = Annotated[float, Meta(ge=0, le=31_536_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(gt=0, le=1e12)]
Factor = Annotated[float, Meta(gt=0, le=1000)]
Bytes = Annotated[int, Meta(ge=0, le=2**62)]
ClientPattern = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.*?-]{1,64}\Z")]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,63}\Z")]
Option = bool | int | float | str
