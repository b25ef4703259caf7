"""Records of the schema before today's, which are read too."""

from collections.abc import Callable
from typing import Any

_OLD, NEW = "vitopt.record/1", "vitopt.record/2"


def upgraded(content: Any) -> Any:
    """The JSON of a record in today's schema, where it is of the one before; anything else as it is."""
    if not isinstance(content, dict) or content.get("schema") != _OLD:
        return content
    old = dict(content.get("variant") or {})
    take: Callable[..., Any] = lambda *names: next((old.pop(name) for name in names if name in old), None)  # noqa: E731
    switches = {"channels_last": take("channels_last"), "autotune": take("autotune")}
    fused = bool(take("fused_attentions"))
    asked = {"attention": take("attention_requested"), "sdpa_kernel": take("sdpa_kernel_requested")}
    ran = {"attention": take("attention_used"), "sdpa_kernel": take("sdpa_kernel_used")}
    reasons = {"attention": take("attention_reason"), "sdpa_kernel": take("sdpa_kernel_reason")}
    asked |= switches | {"fuse_qkv": fused, "compile": take("compile_requested")}
    compiled = take("compile_used")
    ran |= switches | {"fuse_qkv": fused, "compile": compiled, "autotune": bool(compiled and switches["autotune"])}
    reasons["compile"] = take("compile_reason")
    old |= {
        "asked": asked,
        "ran": ran if ran["attention"] is not None else {},
        "reasons": {option: why for option, why in reasons.items() if why is not None},
    }
    return content | {"schema": NEW, "variant": old}
