"""Holdfast: say what fits a memory budget, run it within the budget, prove it by measurement."""

__version__ = "0.1.0"
__all__ = ["Plan", "fit"]


def __getattr__(name: str):
    # Lazy, so that `holdfast --help` and the catalogue answer without importing torch.
    if name == "fit":
        from holdfast.plan.fit import fit

        return fit
    if name == "Plan":
        from holdfast.plan.plan import Plan

        return Plan
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
