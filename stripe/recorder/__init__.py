"""Recording: attention of a running network into a run on disk, in loops of every kind.

`recorder` has the Recorder, which reads the gates and stores what is committed; `callback` has the RecorderCallback,
which does so in trainings by `stripe.training.fit`, Lightning and transformers; `batches` finds inputs, labels and
sample ids in a loader's batches; `group` has what the processes of a job must agree on.
"""

from stripe.recorder.callback import RecorderCallback
from stripe.recorder.recorder import FORWARDS, Recorder

__all__ = ["FORWARDS", "Recorder", "RecorderCallback"]
