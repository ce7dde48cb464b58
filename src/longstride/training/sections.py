"""Values in sections, addressed by dotted keys: what every recipe is, whatever it is for.

A recipe is a frozen dataclass of frozen dataclasses, one a section. A YAML file names only what differs from the
defaults, and a dotted key such as ``model.hidden_size`` names one value.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import yaml

from longstride.errors import RecipeError
from longstride.training.recipe_values import convert, suggestion


class Sections:
    """The base of recipes. A recipe checks its values in ``__post_init__`` and raises RecipeError."""

    #: Only dataclasses derive from this.
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def items(self) -> Iterator[tuple[str, Any]]:
        """(dotted key, value), in the order of the file."""
        for section in dataclasses.fields(self):
            values = getattr(self, section.name)
            for entry in dataclasses.fields(values):
                yield f"{section.name}.{entry.name}", getattr(values, entry.name)

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        return dict(self.items())[key]

    def override(self, values: Mapping[str, Any], origin: str = "") -> Self:
        """Another recipe, with the values of some dotted keys replaced.

        Args:
            origin: what error messages should name as the place of the mistake, such as a file.

        Raises:
            RecipeError: an unknown key, or a value of the wrong type or size.
        """
        prefix = f"{origin}: " if origin else ""
        known = [key for key, _ in self.items()]
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            if key not in known:
                raise RecipeError(f"{prefix}unknown key {key}{suggestion(key, known)}")
            section, name = key.split(".")
            hint = get_type_hints(type(getattr(self, section)))[name]
            try:
                sections.setdefault(section, {})[name] = convert(value, hint)
            except ValueError as error:
                raise RecipeError(f"{prefix}{key} is {value!r}: it must be {error}") from error
        try:
            return dataclasses.replace(
                self,
                **{name: dataclasses.replace(getattr(self, name), **changed) for name, changed in sections.items()},
            )
        except RecipeError as error:
            raise RecipeError(f"{prefix}{error}") from error

    def to_yaml(self) -> str:
        """Every value, as a YAML text that `read_recipe` reads back."""
        plain = {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


S = TypeVar("S", bound=Sections)


def read_sections(path: Path, default: S) -> S:
    """The recipe in a YAML file; what the file leaves out has its default.

    Raises:
        RecipeError: no such file, not YAML, an unknown key or an illegal value.
    """
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}; check --recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    sections = [section.name for section in dataclasses.fields(default)]
    if written is None:
        return default
    if not isinstance(written, dict):
        raise RecipeError(f"{path}: a recipe consists of the sections {', '.join(sections)}, not of {written!r}")
    values = {}
    for section, entries in written.items():
        if section not in sections:
            raise RecipeError(f"{path}: unknown section {section}{suggestion(str(section), sections)}")
        if entries is not None and not isinstance(entries, dict):
            raise RecipeError(f"{path}: the section {section} must hold keys with values, not {entries!r}")
        values.update({f"{section}.{name}": value for name, value in (entries or {}).items()})
    return default.override(values, origin=str(path))
