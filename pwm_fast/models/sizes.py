"""World-model sizes of TD-MPC2 (Hansen et al. 2024, Table 9), one row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Widths of one world model; `encoder_layers` counts the layer that ends in the latent state."""

    encoder_dim: int
    encoder_layers: int
    mlp_dim: int
    latent_dim: int


SIZES = {
    "1M": Size(256, 2, 384, 128),
    "5M": Size(256, 2, 512, 512),
    "19M": Size(1024, 3, 1024, 768),
    "48M": Size(1792, 4, 1792, 768),
    "317M": Size(4096, 5, 4096, 1376),
}


def size(name: str) -> Size:
    """The row of a size; raises ValueError that lists the known ones."""
    if name not in SIZES:
        raise ValueError(f"unknown size {name!r}; sizes are {', '.join(SIZES)}")
    return SIZES[name]
