"""What the settings of every technique have in common."""

from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError


class Settings(BaseModel):
    """A section of the job file: strict types, no unknown keys, immutable, no NaN or infinity.

    A section with one leading choice may be written as that choice alone: where a subclass names its
    leading key in ``SHORTHAND``, ``"fp16"`` stands for ``{"dtype": "fp16"}``.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    SHORTHAND: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str) and cls.SHORTHAND is not None:
            return {cls.SHORTHAND: value}
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _within_reason(cls, value: Any) -> Any:
        """Refuse what no file name, shell or environment can hold, and no number of a machine."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character, which no shell or environment can")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("must be less than 2^63, the end of what a machine counts with")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _choice_of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` and ``1.0`` for the choice ``1``, which they equal in Python."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        if any(value == choice and type(value) is not type(choice) for choice in choices):
            raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, choices))})
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The JSON Schema of the section: the object, or the string that stands for it."""
        schema = handler(core_schema)
        if cls.SHORTHAND is None:
            return schema
        leading = handler.resolve_ref_schema(schema)["properties"][cls.SHORTHAND]
        return {"anyOf": [leading, schema]}


def changed(settings: Settings, *names: str) -> list[str]:
    """Those of the fields ``names`` whose value is not their default, in the order given."""
    fields = type(settings).model_fields
    return [
        name
        for name in names
        if getattr(settings, name) != fields[name].get_default(call_default_factory=True)
    ]
