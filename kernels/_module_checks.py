"""Checks of the constructors in modules.py. Each raises a ValueError; `name` is the module."""

from ..errors import unknown_name


def check_norm(name: str, normalized_shape: tuple[int, ...], eps: float | None) -> float | None:
    """Return eps as a float, or None. PyTorch cannot add an int over 64 bits to a tensor."""
    if len(normalized_shape) != 1:
        raise ValueError(
            f"{name}: normalized_shape must have one axis, got {tuple(normalized_shape)}; "
            "flatten the last axes of x"
        )
    if eps is not None and not eps >= 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")
    return None if eps is None else float(eps)


def check_layout(name: str, layout: str, known: tuple[str, ...]) -> None:
    if layout not in known:
        raise ValueError(f"{name}: {unknown_name('layout', layout, known)}")


def check_sizes(name: str, **sizes: int | None) -> None:
    for label, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: {label} must be at least 1, got {size}")


def check_heads(
    name: str, d_model: int, n_head: int, n_kv_head: int, head_size: int | None
) -> None:
    check_sizes(name, d_model=d_model, n_head=n_head, n_kv_head=n_kv_head, head_size=head_size)
    if n_head % n_kv_head:
        raise ValueError(f"{name}: n_kv_head must divide n_head {n_head}, got {n_kv_head}")
    if head_size is None and d_model % n_head:
        raise ValueError(
            f"{name}: n_head must divide d_model {d_model}, got {n_head}; or give head_size"
        )
