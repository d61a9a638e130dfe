"""The trials of a study in an Optuna storage: asked for one by one, kept alive while they run, told when they end."""

from __future__ import annotations

import functools
import re
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from normwise.errors import StudyError, need
from normwise.experiments.framework.driver import Plan
from normwise.experiments.framework.store import Result, Run

if TYPE_CHECKING:
    import optuna

BEAT, GRACE = 60, 180
"""Seconds between two signs of life of a trial, and after which one without them is done again."""
RETRIES = 2
CLAIM = 1.0
"""Seconds in which a claim is to be seen by everybody who came at the same time."""
STARTUP = 10
REDUCTION = 2
"""One of so many trials goes on."""


def url_of(storage: str) -> str:
    """A file's name as a database; an URL as it is."""
    return storage if "://" in storage else f"sqlite:///{Path(storage).absolute()}"


def shown(url: str) -> str:
    """Without its password; only its kind where it is no URL, so that its password cannot be found."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if url.startswith("sqlite:///"):
        return url.removeprefix("sqlite:///")
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        parts = None
    if parts is None or "@" in (parts.host or ""):    # a password with an @ that is not written as %40
        return f"{url.partition('://')[0]}://..."
    return parts.set(query={}).render_as_string(hide_password=True)


def told(error: BaseException, url: str) -> str:
    """The text of a driver's error on one line, without what may be a password."""
    text = " ".join(str(error.__cause__ or error).split())
    if url.startswith("sqlite"):
        return text[:300].rstrip(".")
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text[:300].rstrip(".")


def _secrets(url: str) -> set[str]:
    """What may be a password: all before the last @ but the user's name, and every value of the query, as written and as meant."""
    place, _, query = url.partition("://")[2].partition("?")
    words = [*re.split("[:@]", place.rpartition("@")[0])[1:], *re.findall("=([^&]*)", query)]
    return {form for word in words for form in (word, unquote(word)) if form}


def opened(url: str) -> optuna.storages.RDBStorage:
    """The storage behind an URL, made if it is empty.

    Raises:
        MissingExtraError: without optuna.
        StudyError: a storage out of reach, of another version of Optuna, of a kind whose driver is missing, or no database at all.
    """
    need("study", "optuna", what="normwise tune")
    import optuna

    _check_file(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # heartbeats are called experimental
            again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
            make = functools.partial(
                optuna.storages.RDBStorage, url, patience, heartbeat_interval=BEAT, grace_period=GRACE, heartbeat_stale_trial_callback=again
            )
            found = _made(make)
        if url.startswith("sqlite"):
            _in_short_order(found.engine)
        return found
    except StudyError:
        raise
    except Exception as error:    # SQLAlchemy's, its drivers' and Optuna's own are of no common kind
        said = f"{type(error).__name__}: {told(error, url)}"
        raise StudyError(f"the storage {shown(url)} cannot be used ({said}); give another --storage.") from None


def _check_file(url: str) -> None:
    """StudyError for an SQLite database in memory, or one of something else, which is left as it is."""
    if not url.startswith("sqlite"):
        return
    path = url.partition(":///")[2].partition("?")[0]
    if path in ("", ":memory:"):
        raise StudyError("the storage is a database in memory, which no other process sees and nothing outlives; give --storage a file.")
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:    # no file yet, or one that Optuna's own error tells more about
        return
    if tables and not tables >= {"studies", "trials", "version_info"}:
        raise StudyError(f"the storage {shown(url)} is a database of something else (it has {', '.join(sorted(tables)[:3])}); give another "
                         "--storage.")  # fmt: skip


def _made(make: Callable[[], optuna.storages.RDBStorage], tries: int = 3) -> optuna.storages.RDBStorage:
    """Two commands that begin at once make the same tables: whoever comes second finds them at the next try."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    try:
        return make()
    except (IntegrityError, OperationalError, ProgrammingError) as error:
        if tries == 0 or not re.search("already exists|unique", str(error), re.IGNORECASE):
            raise
    time.sleep(CLAIM / 2)
    return _made(make, tries - 1)


def _in_short_order(engine: Any) -> None:
    """A trial is some twenty commits, each of which would wait for the disk: with a log it waits at its end only. A kill loses nothing."""
    from sqlalchemy import event

    event.listen(engine, "connect", lambda connection, _: connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"))
    engine.dispose()


def _in_one_file(path: Path) -> None:
    """What is still in the log beside a database goes into it, so that the one file is all there is to copy."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")


_here: dict[str, optuna.storages.RDBStorage] = {}
"""By their URLs those that this process has opened."""


@contextmanager
def in_reach(url: str, file: Path | None) -> Iterator[optuna.storages.RDBStorage]:
    """The storage behind an URL, open within: what breaks between here and there is one StudyError. file: where nobody else works on it."""
    storage = _here[url] = opened(url)
    import optuna
    import sqlalchemy.exc

    try:
        yield storage
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StudyError(
            f"the storage {shown(url)} does not answer any more ({told(error, url)}); finished trials are kept, start the same command "
            "again."
        ) from None
    finally:
        trial_of.cache_clear()
        del _here[url]
        storage.remove_session()
        storage.engine.dispose()
        if file is not None:
            _in_one_file(file)


def first_rung(steps: int) -> int:
    """The step at or after which it is first asked whether a trial goes on; each further rung is ``REDUCTION`` times as far."""
    return max(1, steps // 4)


@functools.lru_cache(maxsize=1)
def trial_of(url: str, name: str, id: int, steps: int) -> optuna.trial.Trial:
    """A trial of the study ``name`` in a process that trains it. The better half goes on, at a quarter and at half of the steps.

    Raises:
        StudyError: where there is no such study.
    """
    import optuna

    if url not in _here:
        _here[url] = opened(url)
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung(steps), reduction_factor=REDUCTION)
    try:
        study = optuna.load_study(study_name=name, storage=_here[url], sampler=optuna.samplers.RandomSampler(), pruner=halving)
    except KeyError:    # a file of another machine, which is empty here
        raise StudyError(f"a worker finds no study {name!r} in {shown(url)}; give a --storage that all workers reach.") from None
    return optuna.trial.Trial(study, id)


def study_of(storage: optuna.storages.RDBStorage, name: str, asked: Mapping[str, Any], directions: Sequence[Any]) -> optuna.Study:
    """The study of this name, begun or gone on with. asked: what two commands must agree on to share it.

    Raises:
        StudyError: where a study of this name was begun with something else.
    """
    import optuna

    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    begun = study.user_attrs.get("asked")
    if [one.name.lower() for one in study.directions] != list(directions):    # one that is there keeps its own, unasked
        raise StudyError(f"the study {name!r} is there with the directions {', '.join(one.name.lower() for one in study.directions)}, and "
                         f"{', '.join(directions)} is asked for; give another --name or --storage.")  # fmt: skip
    if begun is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("asked", dict(asked))
    elif begun != asked:
        other = [key for key in asked if begun is None or begun.get(key) != asked[key]]
        raise StudyError(
            f"the study {name!r} was begun with another {' and another '.join(other)}; give another --name or --storage, or what it was "
            "begun with."
        )
    return study


class Trials:
    """The trials of one Optuna study as work for a driver.

    Args:
        study: where they are kept.
        lost: the result of a trial whose worker was killed time and again.
        alone: nobody else works on it: a trial that is under way was left by a process that is gone, and is taken up again as it was.
    """

    def __init__(self, study: optuna.Study, lost: Result, alone: bool) -> None:
        import optuna

        self.study, self.lost, self.alone, self.mine = study, lost, alone, set[int]()
        self.left = study.get_trials(states=(optuna.trial.TrialState.RUNNING,)) if alone else []

    def killed(self) -> None:
        """Counts, for what is under way here, that a worker was killed. In a database others do that, by the signs of life that end."""
        for id in self.mine if self.alone else ():
            times = self.study._storage.get_trial(id).user_attrs.get("killed", 0)
            self.study._storage.set_trial_user_attr(id, "killed", times + 1)

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Those with a result, in their order; also those that were given up, refused or failed."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished() and "result" in trial.user_attrs]

    def waiting(self) -> list[dict[str, Any]]:
        """The candidates that wait, or are under way."""
        known = [trial for trial in self.study.get_trials(deepcopy=False) if not trial.state.is_finished()]
        return [dict(trial.system_attrs.get("fixed_params", trial.params)) for trial in known]

    def begins(self) -> bool:
        """Of those that work on one study, whether this one puts the first candidates into it: of two that come to an empty study, the one
        that said so last. The other one waits until they are there."""
        if any(not trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False)):
            return False
        mine = uuid.uuid4().hex
        self.study.set_user_attr("begun by", mine)
        time.sleep(CLAIM)
        if self.study.user_attrs.get("begun by") == mine:
            return True
        until = time.monotonic() + 30 * CLAIM
        while time.monotonic() < until:
            if self.study.get_trials(deepcopy=False):
                return False
            time.sleep(0.1)
        return True

    def lane(
        self, wanted: int, run_of: Callable[[Any], Run], outcome: Callable[[Result], tuple[Any, Any]], sound: Callable[[], None]
    ) -> Plan:  # fmt: skip
        """Trials one after the other, until there are ``wanted`` of them and none waits.

        outcome: a result's state and values. sound: is called after each, and raises where it is of no use to go on.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        while (trial := self._next(wanted)) is not None:
            [result] = yield [run_of(trial)]
            state, values = outcome(result)
            # A machine that slept for a while: its trial is somebody else's by now. SQLite, too, may give a waiting trial to two.
            with suppress(UpdateFinishedTrialError):
                trial.set_user_attr("result", result)
            with suppress(UpdateFinishedTrialError):
                self.study.tell(trial.number, values, state, skip_if_finished=True)
            self.mine.discard(trial._trial_id)
            sound()

    def elsewhere(self) -> bool:
        """Whether somebody else's trials are under way or wait."""
        import optuna

        states = (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING)
        return not self.alone and any(trial._trial_id not in self.mine for trial in self.study.get_trials(deepcopy=False, states=states))

    def _next(self, wanted: int) -> optuna.trial.Trial | None:
        import optuna

        while self.left:
            trial = optuna.trial.Trial(self.study, self.left.pop(0)._trial_id)
            if trial.user_attrs.get("killed", 0) <= RETRIES:
                return self._kept(trial)
            trial.set_user_attr("result", dict(self.lost))
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not self.alone:
                optuna.storages.fail_stale_trials(self.study)
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in trials)
            new = sum(not optuna.storages.RetryHeartbeatStaleTrialCallback.retry_history(trial) for trial in trials)
            if not waiting and new >= wanted:
                return None
            asked = self.study.ask()
            given = self.study._storage.get_trial(asked._trial_id)
        if new >= wanted and not given.params and "fixed_params" not in given.system_attrs:
            # Somebody else took the one that waited, so that this is a new one, which nobody wants.
            self.study.tell(asked.number, state=optuna.trial.TrialState.FAIL)
            return None
        return self._kept(asked)

    def _kept(self, trial: optuna.trial.Trial) -> optuna.trial.Trial:
        self.mine.add(trial._trial_id)
        if not self.alone:
            self.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        return trial

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Within, trials that are asked for give signs of life until they end, where there are others who look for them."""
        if self.alone:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                for one in list(self.mine):
                    with suppress(Exception):    # the study itself says what is wrong with the storage
                        self.study._storage.record_heartbeat(one)  # type: ignore[attr-defined]

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's TPE, made anew for each trial from ``seed`` and the trial's number: a study that goes on proposes what it would have
    proposed without the interruption."""
    import optuna

    class Anew(optuna.samplers.TPESampler):
        def before_trial(self, study: Any, trial: Any) -> None:
            drawn = np.random.SeedSequence([seed, trial.number]).generate_state(1)[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")    # both options are called experimental
                super().__init__(n_startup_trials=STARTUP, multivariate=True, group=True, seed=int(drawn))

    return Anew()
