"""`corank heal`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from corank.api import check_target
from corank.assess import assess, write_documents
from corank.commands.arguments import read_texts
from corank.commands.output import console, emit
from corank.engine.world import launched, rank
from corank.errors import CorankError
from corank.heal.overlap import TESTS
from corank.heal.training import Schedule
from corank.healing import heal as heal_model
from corank.healing import told
from corank.report import Report, numbers
from corank.report.progress import Bar
from corank.report.table import print_report
from corank.watch import Watch


def heal(args: Namespace) -> int:
    """``corank heal``; under torchrun all processes work, and one speaks."""
    with launched(args.device) as speaks:
        try:
            return _heal(args)
        except (CorankError, KeyboardInterrupt) as error:
            if speaks():
                raise
            raise SystemExit(2 if isinstance(error, CorankError) else 130) from None


def _heal(args: Namespace) -> int:
    first = rank() == 0
    out = check_target(args.out)
    texts = [] if args.no_eval else read_texts(args.text)
    schedule = Schedule(
        epochs=args.epochs,
        minutes=args.minutes,
        learning_rate=args.learning_rate,
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed or 0,
        precision=args.precision,
    )
    watch = _Watch(args.quiet or not first)
    try:
        healed = heal_model(
            args.model,
            args.teacher,
            args.how,
            out=out,
            data=args.data or "builtin",
            samples=args.samples or 64,
            length=args.length or 512,
            what=args.what,
            schedule=schedule,
            tests=texts or TESTS,
            device=args.device,
            progress=watch,
        )
    finally:
        watch.close()
    if not first:
        return 0
    report = None
    source = Path(args.model) / "report.json"
    if source.is_file():
        report = told(Report.load(source), healed)
        if texts:
            measuring = Watch("heal", 1, args.quiet)
            try:
                report = assess(
                    report,
                    args.teacher or report.model,
                    out,
                    texts,
                    windows=args.windows or None,
                    window=args.window,
                    step=measuring.step,
                )
            finally:
                measuring.close()
        report.save(out / "report.json")
        write_documents(report, out)
    if args.json:
        emit({"healing": healed.to_json(), "report": report.to_json() if report else None})
        return 0
    if report is not None and texts:
        print_report(report, console())
    print(
        f"\n{numbers.count(healed.trained)} parameters healed in {numbers.duration(healed.seconds)}; on held-out sequences "
        f"{healed.before:.4g} -> {healed.after:.4g} {healed.measure}."
    )
    for note in healed.notes:
        print(f"Note: {note}")
    print(f"{out} is ready.")
    return 0


class _Watch:
    """One bar for each part of the work, with the loss on the held-out sequences."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self._bar: Bar | None = None
        self._what = ""

    def __call__(self, what: str, done: int, of: int, value: float) -> None:
        if self._bar is None or what != self._what:
            self.close()
            self._bar = Bar(max(of, 1), quiet=self.quiet, description=f"heal: {what}", unit="step").__enter__()
            self._what = what
        self._bar.total = max(of, 1)
        self._bar.update(done, what, None if value != value else value)

    def close(self) -> None:
        """Finish the bar that is open."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
