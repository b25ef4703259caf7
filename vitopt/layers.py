"""What the linear layers of a block are called, in vitopt's own words. Imports nothing."""

from typing import Literal, get_args

Linear = Literal["query", "key", "value", "output", "fc1", "fc2"]
LINEARS: tuple[Linear, ...] = get_args(Linear)
QKV = "qkv"  # timm's one layer for query, key and value
