"""Recording: attention of a running network into a run on disk, in loops of every kind.

`recorder` has the Recorder, which reads and stores what is committed; `callback` the RecorderCallback, which does it in
the trainings of `stripe.training.fit`, Lightning and transformers; `batches` says what is what in a loader's batch,
`group` what the processes of a job must agree on.
"""

from stripe.recorder.callback import RecorderCallback
from stripe.recorder.recorder import FORWARDS, Recorder

__all__ = ["FORWARDS", "Recorder", "RecorderCallback"]
