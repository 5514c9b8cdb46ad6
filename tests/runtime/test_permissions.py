"""What each role of nats.conf may not do, tried on a real broker."""

import pytest
from nats.aio.client import Client

from capibara_flow.runtime import connection
from capibara_flow.runtime.client import flushed
from capibara_flow.settings import ROLES
from tests.runtime.rig import Rig
from topics.streams import Layout

STREAMS = [stream.name for stream in Layout().streams]
OTHERS = ("edge", "router", "caller", "observer")


class Tried:
    """A client of a role, and what the broker complained about."""

    def __init__(self, rig: Rig, role: str) -> None:
        self._rig, self._role = rig, role
        self._errors: list[str] = []
        self.client: Client

    async def start(self) -> "Tried":
        async def failed(error: Exception) -> None:
            self._errors.append(str(error))

        self.client = Client()
        options = connection.options(self._rig.settings, self._role) | {"error_cb": failed}
        await self.client.connect(connection.addresses(self._rig.settings, self._role), **options)
        self._rig.clients.append(self.client)
        return self

    async def may_publish(self, subject: str) -> bool:
        await self.client.publish(subject, b"{}")
        return await self._allowed("publish", subject)

    async def may_subscribe(self, subject: str) -> bool:
        await self.client.subscribe(subject)
        return await self._allowed("subscription", subject)

    async def _allowed(self, what: str, subject: str) -> bool:
        await flushed(self.client)
        complaint = f'permissions violation for {what} to "{subject}"'.lower()  # nats-py hands it on in small letters
        return not any(complaint in error for error in self._errors)


@pytest.fixture
async def tried(rig: Rig):
    return {role: await Tried(rig, role).start() for role in ROLES}


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("edge", "cf.work.T.router"),
        ("edge", "cf.ctl.T.cancel"),
        ("router", "cf.work.T.call.phi.0"),
        ("router", "$JS.API.CONSUMER.MSG.NEXT.CF_WORK_ROUTER.router"),
        ("caller", "cf.out.T.data.main"),
        ("caller", "$KV.CF_REPORTS.caller.p"),
        ("accountant", "$JS.API.CONSUMER.MSG.NEXT.CF_LOG.accountant"),
        ("provisioner", "$JS.API.STREAM.DELETE.CF_MINE"),
    ],
)
async def test_the_check_itself_tells_what_is_allowed(tried: dict[str, Tried], role: str, subject: str):
    assert await tried[role].may_publish(subject)


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        ("edge", "cf.out.T.data.main"),
        ("edge", "cf.out.T.lease.main"),
        ("edge", "cf.live.T.main"),
        ("edge", "cf.work.T.call.phi.0"),
        ("edge", "cf.log.T.router"),
        ("edge", "cf.dead.T.router"),
        ("edge", "$JS.API.CONSUMER.MSG.NEXT.CF_WORK_ROUTER.router"),
        ("edge", "$JS.API.STREAM.CREATE.CF_MINE"),
        ("edge", "_INBOX_caller.x.y"),
        ("router", "cf.work.T.router"),
        ("router", "cf.live.T.main"),
        ("router", "cf.log.T.caller"),
        ("router", "$JS.API.CONSUMER.MSG.NEXT.CF_WORK_CALL.caller-phi"),
        ("router", "$JS.ACK.CF_WORK_CALL.caller-phi.1.1.1.1.0"),
        ("router", "$JS.API.CONSUMER.CREATE.CF_OUT.spy.cf.out.>"),
        ("router", "$JS.API.STREAM.CREATE.CF_MINE"),
        ("caller", "cf.work.T.router"),
        ("caller", "cf.live.T.main"),
        ("caller", "cf.ctl.T.cancel"),
        ("caller", "$JS.API.CONSUMER.MSG.NEXT.CF_WORK_ROUTER.router"),
        ("caller", "$JS.ACK.CF_WORK_ROUTER.router.1.1.1.1.0"),
        ("caller", "$JS.API.CONSUMER.CREATE.CF_OUT.spy.cf.out.>"),
        ("observer", "$JS.API.CONSUMER.CREATE.CF_OUT.spy"),
        ("observer", "$JS.API.CONSUMER.MSG.NEXT.CF_WORK_ROUTER.router"),
        ("provisioner", "cf.out.T.lease.main"),
        ("provisioner", "cf.live.T.main"),
        ("undertaker", "cf.work.T.router"),
        ("undertaker", "cf.ctl.T.erase"),
        ("undertaker", "$JS.API.STREAM.DELETE.CF_OUT"),
        ("accountant", "cf.log.T.caller"),
        ("accountant", "cf.out.T.lease.main"),
        ("accountant", "cf.ctl.T.usage"),
        ("accountant", "$JS.API.STREAM.PURGE.CF_LOG"),
        ("accountant", "$JS.API.CONSUMER.CREATE.CF_LOG.spy.cf.log.>"),
        ("edge", "$JS.API.STREAM.PURGE.CF_OUT"),
        ("caller", "$KV.CF_READERS.T"),
        ("caller", "$KV.CF_REPORTS.router.p"),
        ("edge", "$KV.CF_REPORTS.caller.p"),
        ("observer", "$KV.CF_REPORTS.caller.p"),
    ],
)
async def test_no_role_publishes_what_is_not_its_own(tried: dict[str, Tried], role: str, subject: str):
    assert not await tried[role].may_publish(subject)


async def test_an_observer_publishes_nothing_of_ours(tried: dict[str, Tried]):
    subjects = "work.T.router work.T.call.phi.0 out.T.data.main out.T.lease.main live.T.main ctl.T.cancel log.T.x dead.T.x"
    for subject in subjects.split():
        assert not await tried["observer"].may_publish(f"cf.{subject}")


@pytest.mark.parametrize("role", ROLES)
async def test_nobody_reads_the_inbox_of_another(tried: dict[str, Tried], role: str):
    assert await tried[role].may_subscribe(f"_INBOX_{role}.>")
    for other in set(ROLES) - {role}:
        assert not await tried[role].may_subscribe(f"_INBOX_{other}.>")
    assert not await tried[role].may_subscribe(">")
    assert not await tried[role].may_subscribe("*.>")
    assert not await tried[role].may_subscribe("_INBOX.>")


@pytest.mark.parametrize("role", ["edge", "router", "caller", "provisioner"])
async def test_only_an_observer_overhears(tried: dict[str, Tried], role: str):
    assert await tried["observer"].may_subscribe("cf.>")
    for subject in ("cf.>", "cf.work.>", "cf.out.>", "cf.log.>", "cf.dead.>"):
        assert not await tried[role].may_subscribe(subject)


@pytest.mark.parametrize("role", OTHERS)
async def test_only_the_provisioner_deletes_purges_and_updates(rig: Rig, tried: dict[str, Tried], role: str):
    for stream in STREAMS:
        for deed in ("DELETE", "PURGE", "UPDATE", "MSG.DELETE"):
            assert not await tried[role].may_publish(f"$JS.API.STREAM.{deed}.{stream}")
    assert not await tried[role].may_publish("$JS.API.CONSUMER.DELETE.CF_WORK_ROUTER.router")
    assert {info.config.name for info in await rig.admin.streams_info()} == set(STREAMS)
