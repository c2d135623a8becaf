"""The settings of ``bucketing.py``, apart from it: a job file is checked without numpy."""

from typing import Literal

from pydantic import Field, model_validator

from memlaunch.strategies.settings import Settings

Mode = Literal["bucketed", "random", "packed"]


class BatchingSettings(Settings):
    """How samples are put together into micro-batches."""

    SHORTHAND = "mode"

    mode: Mode = Field(
        default="bucketed",
        description="`bucketed` puts samples of like length together, `random` does so only inside a step, "
        "`packed` (causal-lm) fills blocks of `max_length` with whole samples.",
    )
    bucket_size: int | None = Field(
        default=None,
        ge=1,
        description="Samples of like length that an optimizer step takes together; default: ranks x "
        "micro-batch of the first launch. A resumed run keeps it, and with it the samples of every step.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="The most tokens of a micro-batch, padding included; takes the place of "
        "`micro_batch_size` and `gradient_accumulation_steps`.",
    )
    longest_first: bool = Field(
        default=True,
        description="Begin the first epoch with the largest micro-batch, so that what does not fit in memory "
        "shows at once.",
    )

    @model_validator(mode="after")
    def _check_mode(self) -> "BatchingSettings":
        if self.bucket_size is not None and self.mode != "bucketed":
            raise ValueError(f"`bucket_size` means nothing where `mode` is `{self.mode}`; leave it out")
        if self.max_tokens is not None and self.mode == "packed":
            raise ValueError("`packed` fills blocks of `max_length`; leave `max_tokens` out")
        return self
