"""Names for what the array API standard leaves untyped."""

from typing import Any, TypeAlias

#: An array of any library that follows the Python array API standard.
Array: TypeAlias = Any
#: The module whose functions belong to an array.
Namespace: TypeAlias = Any
#: A data type object of some array library.
DType: TypeAlias = Any
#: A device object of some array library.
Device: TypeAlias = Any
