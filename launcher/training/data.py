"""The job's data as tokens, and the order in which it is trained on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memlaunch.launcher.training import tokens
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.model import load_config, load_tokenizer
from memlaunch.strategies import padding
from memlaunch.strategies.batching import Mode
from memlaunch.strategies.bucketing import BucketedSampler

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from memlaunch.launcher.resolve import ResolvedJob

#: Where neither the job nor the tokenizer says how long a sample may be.
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Data:
    """What a job trains and evaluates on.

    Attributes:
        pad_token: the id to pad with: the tokenizer's, else the model's, else one that the mask hides.
        max_length: tokens that a sample was cut to.
        heldout: what to evaluate on, or None.
    """

    tokenizer: "PreTrainedTokenizerBase"
    pad_token: int
    max_length: int
    train: tokens.Tokens
    heldout: tokens.Tokens | None

    @property
    def widest(self) -> int:
        """The most tokens of a row in a micro-batch; a target is as long as a text, at most."""
        return self.max_length * (2 if self.train.longest[1] else 1)

    def fill(self, field: str) -> int:
        """The value that ``field`` of a batch is padded with."""
        types = int(self.tokenizer.pad_token_type_id)
        return {"input_ids": self.pad_token, "token_type_ids": types}.get(field, 0)


def load(resolved: "ResolvedJob") -> Data:
    """Tokenise the job's data, or find its tokens in the cache.

    Raises:
        JobMismatch: a file cannot be read, or the tokenizer cannot be loaded.
    """
    job = resolved.job
    tokenizer = load_tokenizer(job.model)
    limit = int(tokenizer.model_max_length)  # a huge number says that there is none
    max_length = job.data.max_length or (limit if limit < 1_000_000 else DEFAULT_MAX_LENGTH)
    train = tokens.prepare(job.data, "train", tokenizer, job.model.task, max_length)
    heldout = (
        tokens.prepare(job.data, "eval", tokenizer, job.model.task, max_length) if job.data.eval else None
    )
    config = load_config(job.model)
    pads = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    pad_token = next((token for token in pads if isinstance(token, int)), 0)
    _check_size(config, tokenizer, train, job.model.tokenizer is not None)
    return Data(tokenizer, pad_token, max_length, train, heldout)


def _check_size(
    config: Any, tokenizer: "PreTrainedTokenizerBase", train: tokens.Tokens, own_tokenizer: bool
) -> None:
    """See that the model has an embedding for every token and every position.

    Raises:
        JobMismatch: it has fewer.
    """
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and len(tokenizer) > vocabulary:
        raise JobMismatch(
            "model.tokenizer" if own_tokenizer else "model.path",
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {vocabulary}",
            "use the tokenizer that the model was made with, or raise `vocab_size` of a new model",
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(train.longest)
    if isinstance(positions, int) and longest > positions:
        raise JobMismatch(
            "data.max_length",
            f"the longest sample has {longest} tokens, the model {positions} positions",
            f"set `data.max_length` to {positions} or less",
        )


def sampler(
    resolved: "ResolvedJob", data: Data, world_size: int, rank: int, mode: Mode | None = None
) -> BucketedSampler:
    """The order of the job's batches: of its samples, or of packed blocks of them.

    Args:
        mode: another mode than the job's, to compare with.

    Raises:
        JobMismatch: a sample is longer than a micro-batch may be.
    """
    mode = mode or resolved.job.data.batching.mode
    lengths: np.ndarray[Any, Any] = data.train.lengths
    if mode == "packed":
        lengths = data.train.packing(data.max_length, resolved.job.training.seed, epoch=0).lengths
    if resolved.job.data.batching.max_tokens is not None:
        # The budget counts what a sample takes once it is padded.
        lengths = padding.padded_lengths(lengths, resolved.job.data.padding, data.max_length)
    return deal(resolved, lengths, world_size, rank, mode, data.train.order if mode == "bucketed" else None)


def deal(
    resolved: "ResolvedJob",
    lengths: "np.ndarray[Any, Any]",
    world_size: int,
    rank: int,
    mode: Mode,
    order: "np.ndarray[Any, Any] | None" = None,
) -> BucketedSampler:
    """The order of the job's batches of samples with these ``lengths``.

    Args:
        order: as for :class:`memlaunch.strategies.bucketing.BucketedSampler`.

    Raises:
        JobMismatch: a sample is longer than a micro-batch may be.
    """
    batching, batch = resolved.job.data.batching, resolved.batch
    by_tokens = batching.max_tokens is not None
    try:
        return BucketedSampler(
            lengths,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=None if by_tokens else batch.micro_batch_size,
            world_size=world_size,
            rank=rank,
            seed=resolved.job.training.seed,
            bucket_size=batching.bucket_size,
            max_tokens=batching.max_tokens,
            mode=mode,
            longest_first=batching.longest_first,
            order=order,
        )
    except ValueError as error:
        hint = "cut the samples shorter, or raise the bound" if by_tokens else "look at the data"
        raise JobMismatch("data.batching", str(error), hint) from error
