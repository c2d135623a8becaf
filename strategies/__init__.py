"""The memory techniques, one file each: settings, DeepSpeed config, work in a rank, check that it took."""

from memlaunch.strategies import accumulation, checkpointing, freezing, lora, optimizer, precision, sharding
from memlaunch.strategies.technique import Technique

#: In the order in which they change the model: what is frozen gets no adapter, a block must know both before
#: it is checkpointed, and autocast goes around everything.
TECHNIQUES: tuple[Technique, ...] = (
    sharding.TECHNIQUE,
    accumulation.TECHNIQUE,
    freezing.TECHNIQUE,
    lora.TECHNIQUE,
    checkpointing.TECHNIQUE,
    precision.TECHNIQUE,
    optimizer.TECHNIQUE,
)
