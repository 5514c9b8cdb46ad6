"""Files that change while we run: real ones, written in every way that editors and people have."""

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from capibara_flow.domain.fleet import Fleet
from capibara_flow.errors import BrokerUnavailable, CannotStart
from capibara_flow.runtime.watching import Watched
from capibara_flow.settings import SettingsError, read_fleet
from tests.waiting import until

ONE = '[[experts]]\nname = "one"\nurls = ["http://h:1"]\n'
TWO = ONE + '[[experts]]\nname = "two"\nurls = ["http://h:2"]\n'
BAD = ONE + "concurrency = 0\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(ONE, encoding="utf-8")
    return path


@pytest.fixture
def taken() -> list[int]:
    return []


@pytest.fixture
async def watched(file: Path, taken: list[int]) -> AsyncIterator[Watched[Fleet]]:
    watching = Watched(file, read_fleet, lambda fleet: taken.append(len(fleet.experts)), every=0.02)
    watching.start()
    yield watching
    await watching.stop()


def in_place(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def by_rename(path: Path, text: str) -> None:
    part = path.with_suffix(".swp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def anew(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    path.unlink()


def with_an_old_date(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.utime(path, (1, 1))


@pytest.mark.parametrize("write", [in_place, by_rename, anew, with_an_old_date])
async def test_a_change_is_taken_however_it_was_written(
    file: Path, watched: Watched[Fleet], taken: list[int], write: Callable[[Path, str], None]
) -> None:
    version = watched.facts()["version"]
    write(file, TWO)
    await until(lambda: taken == [2])
    assert len(watched.value.experts) == 2
    assert watched.facts()["version"] != version
    write(file, ONE)
    await until(lambda: taken == [2, 1])


async def test_a_bad_file_is_refused_once_with_its_line_and_the_old_value_stays(
    file: Path, watched: Watched[Fleet], taken: list[int]
) -> None:
    with capture_logs() as logs:
        in_place(file, BAD)
        await until(lambda: watched.facts()["refused"])
        assert not await watched.check()
    (told,) = [each["error"] for each in logs if each["event"] == "file_refused"]
    assert told.startswith(f"{file}:4: experts.0.concurrency: ")
    assert watched.facts()["refused"].startswith("fleet.toml:4: experts.0.concurrency: ")
    assert (len(watched.value.experts), taken) == (1, [])
    in_place(file, TWO)
    await until(lambda: taken == [2])
    assert watched.facts()["refused"] is None


async def test_a_bad_file_that_becomes_the_old_one_again_is_no_change(file: Path, watched: Watched[Fleet], taken: list[int]) -> None:
    in_place(file, BAD)
    await until(lambda: watched.facts()["refused"])
    in_place(file, ONE)
    await until(lambda: watched.facts()["refused"] is None)
    assert taken == []


async def test_a_file_that_is_gone_leaves_all_as_it_was_until_it_is_back(file: Path, watched: Watched[Fleet], taken: list[int]) -> None:
    with capture_logs() as logs:
        remove(file)
        await until(lambda: [each for each in logs if each["event"] == "file_gone"])
    assert len(watched.value.experts) == 1
    in_place(file, TWO)
    await until(lambda: taken == [2])


async def test_a_file_that_is_still_being_written_is_not_taken_though_it_would_do(file: Path, taken: list[int]) -> None:
    watching = Watched(file, read_fleet, lambda fleet: taken.append(len(fleet.experts)), every=0.05)
    whole = "".join(ONE.replace("one", f"e{number}") for number in range(20))
    watching.start()
    seen: list[int] = []
    digest = watching._digest

    def growing() -> str | None:
        # Whenever somebody looks, another expert has been written: each content would be good.
        if len(seen) < 20:
            seen.append(len(seen))
            in_place(file, whole[: len(whole) * len(seen) // 20])
        return digest()

    watching._digest = growing  # type: ignore[method-assign]
    await until(lambda: taken)
    await watching.stop()
    assert taken == [20]


async def test_who_cannot_use_a_value_refuses_it(file: Path) -> None:
    async def refuse(fleet: Fleet) -> None:
        raise CannotStart("no room")

    watching = Watched(file, read_fleet, refuse)
    in_place(file, TWO)
    assert not await watching.check()
    assert (watching.facts()["refused"], len(watching.value.experts)) == ("no room", 1)


async def test_a_check_takes_it_at_once(file: Path) -> None:
    watching = Watched(file, read_fleet)
    assert not await watching.check()
    in_place(file, TWO)
    assert await watching.check()
    assert len(watching.value.experts) == 2


def test_what_is_bad_from_the_beginning_is_said_at_once(file: Path, tmp_path: Path) -> None:
    in_place(file, BAD)
    with pytest.raises(SettingsError, match=":4: "):
        Watched(file, read_fleet)
    with pytest.raises(SettingsError, match="cannot be read"):
        Watched(tmp_path / "none.toml", read_fleet)


async def test_whatever_a_file_makes_us_do_the_next_one_is_looked_at(file: Path, taken: list[int]) -> None:
    def take(fleet: Fleet) -> None:
        if len(fleet.experts) == 2:
            raise ZeroDivisionError
        taken.append(len(fleet.experts))

    watching = Watched(file, read_fleet, take)
    in_place(file, "x = " + "[" * 5000)
    assert not await watching.check()
    assert "nested too deeply" in watching.facts()["refused"]
    in_place(file, TWO)
    assert not await watching.check()
    assert watching.facts()["refused"] == "ZeroDivisionError"
    in_place(file, ONE + "# better")
    assert await watching.check()
    assert taken == [1]


async def test_a_file_that_could_not_be_taken_for_now_is_tried_again(file: Path) -> None:
    errors: list[Exception] = [BrokerUnavailable("away")]

    def take(fleet: Fleet) -> None:
        if errors:
            raise errors.pop()

    watching = Watched(file, read_fleet, take)
    in_place(file, TWO)
    assert not await watching.check()
    assert watching.facts()["refused"] == "away"
    assert await watching.check()
    assert len(watching.value.experts) == 2


async def test_a_report_tells_of_no_folder(file: Path) -> None:
    def take(fleet: Fleet) -> None:
        raise SettingsError(f"{file.parent}/own.toml:3: routes: bad, see {file.parent}/x.toml: really")

    watching = Watched(file, read_fleet, take)
    in_place(file, TWO)
    assert not await watching.check()
    assert watching.facts()["refused"] == "own.toml:3: routes: bad, see x.toml: really"
