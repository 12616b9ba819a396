"""The options of cross_entropy and linear_cross_entropy."""

from dataclasses import dataclass

from ...errors import unknown_name

REDUCTIONS = ("mean", "sum", "none")
# float32 holds the squares of this number and of its reciprocal.
MAX_OPTION = 1e18


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The options of both losses, with their defaults. cross_entropy describes each.

    Operators take one LossOptions; define_op replaces it by its fields in their schemas.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    reduction: str = "mean"

    def check(self, name: str, z_loss_label: str = "z_loss") -> None:
        """Raise a ValueError for an option out of range.

        Args:
            name: the operator.
            z_loss_label: the name that it gives to the option z_loss.
        """
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"{name}: label_smoothing must be from 0 to 1, got {self.label_smoothing}"
            )
        if not 0 <= self.z_loss <= MAX_OPTION:
            raise ValueError(
                f"{name}: {z_loss_label} must be from 0 (no z-loss) to {MAX_OPTION}, "
                f"got {self.z_loss}"
            )
        if self.softcap and not 1 / MAX_OPTION <= self.softcap <= MAX_OPTION:
            raise ValueError(
                f"{name}: softcap must be 0 (no softcap) or from {1 / MAX_OPTION} to {MAX_OPTION}, "
                f"got {self.softcap}"
            )
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"{name}: {unknown_name('reduction', self.reduction, REDUCTIONS)}")
