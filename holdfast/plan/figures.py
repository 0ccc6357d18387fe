"""Drawing with matplotlib, an optional dependency, without a display."""

from pathlib import Path
from typing import Any

from holdfast.errors import UsageError


def plots() -> Any:
    """matplotlib's figure module, which draws without a display.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise UsageError(
            "drawing needs matplotlib, which is not installed; pip install 'holdfast[plots]'"
        ) from error
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; the suffix says the format. The same figure gives the same file.

    Text in an SVG stays text, which can be searched and read aloud.

    Raises:
        UsageError: a suffix that matplotlib does not know, or a folder that cannot be written.
    """
    import matplotlib

    if not path.suffix:  # matplotlib would append one of its own
        raise UsageError(f"cannot draw {path}: no suffix says in which format; use .png or .svg")
    options = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else {}
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "holdfast"}):
            figure.savefig(path, **options)
    except ValueError as error:
        raise UsageError(f"cannot draw {path}: {error}; use .png or .svg") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another") from error
