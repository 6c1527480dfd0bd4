"""What a user sees while training: stage, epoch, loss and the latest validation numbers on the usual bar or lines."""

from typing import TextIO

from rush_bench.progress import Bar


class Progress(Bar):
    """The loop calls it where it has read the loss anyway: no further host sync."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream=stream)
        self.epochs = 0
        self.numbers: dict[str, float] = {}

    def start(self, stage: str, epochs: int, total: int, done: int) -> None:
        """A stage of `total` steps begins, or goes on after `done` of them."""
        self.epochs, self.numbers = epochs, {}
        self.begin(stage, total, done)

    def measured(self, numbers: dict[str, float]) -> None:
        """Validation numbers, shown from now on."""
        self.numbers = numbers

    def update(self, epoch: int, done: int, loss: float) -> None:
        """`done` steps of the stage are behind us, the last with this loss."""
        extra = "".join(f"  {key} {100 * value:.1f} %" for key, value in self.numbers.items())
        self.show(done, f"epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}{extra}")
