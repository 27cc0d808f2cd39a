"""The colours of figures and pages, light and dark. They tell apart with the common colour-vision deficiencies."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure or a page: what it lies on, text, thin lines, what stands back, and of series in their order."""

    page: str
    ink: str
    faint: str
    grey: str
    cycle: tuple[str, ...]

    def colour(self, index: int) -> str:
        """The colour of the index-th series."""
        return self.cycle[index % len(self.cycle)]


LIGHT = Theme(
    "#ffffff", "#2a3140", "#e6e9ef", "#b4bbc8",
    ("#3b6fd4", "#e08a1e", "#2a9d76", "#7f13ec", "#ec1354", "#5e0856", "#c07cb9", "#2c0da5"),
)  # fmt: skip
DARK = Theme(
    "#1a202c", "#e6e9f0", "#2c3444", "#667085",
    ("#86acf5", "#f0b35c", "#5fd0a6", "#9942f0", "#f042aa", "#d5cef3", "#f0de42", "#a8e699"),
)  # fmt: skip
