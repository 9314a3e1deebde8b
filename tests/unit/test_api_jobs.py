"""Jobs over the local HTTP API: submitting them, and the events that tell their story."""

from __future__ import annotations

import json

import pytest
import trio

from p2pflop.dht.manifest import address_of
from p2pflop.job.submission import Submission, encode_submission
from p2pflop.node.memory_service import MemoryService
from tests.serving import LIMITS, error_of, serving, submit


class TestRuns:
    async def test_submit_passes_the_options_on(self) -> None:
        async with serving() as server:
            reply = await server.client.post("/v1/jobs?max_nusd=5&deadline_s=60", content=b"job")
            assert reply.status_code == 201
            run = server.service.runs[reply.json()["id"]]
            assert run.body == b"job"
            assert (run.options.max_nusd, run.options.deadline_s) == (5, 60)
            assert run.options.checkpoint_steps is None
            listed = (await server.get("/v1/jobs")).json()["jobs"]
            assert [job["id"] for job in listed] == [run.id]
            path = f"/v1/jobs/{run.id}"
            assert (await server.get(path)).json()["id"] == run.id
            assert (await server.get(f"{path}/file")).content == b"job"
            assert error_of(await server.get(f"{path}/record"))["kind"] == "ConfigError"

    async def test_jobs_of_packs_are_listed_on_request(self) -> None:
        service = MemoryService()
        service.parts = [{"id": "cd" * 6, "pack": "ab" * 6}]
        async with serving(service) as server:
            run = await submit(server)
            for query, listed in (("", []), ("?parts=0", []), ("?parts=1", service.parts)):
                jobs = (await server.get(f"/v1/jobs{query}")).json()["jobs"]
                assert [job["id"] for job in jobs] == [*(job["id"] for job in listed), run]
            assert error_of(await server.get("/v1/jobs?parts=2"))["kind"] == "ConfigError"

    @pytest.mark.parametrize(
        "query",
        [
            "max_nusd=-1",
            "max_nusd=1.5",
            "max_nusd=" + "9" * 20,
            "deadline_s=x",
            "deadline_s=0",
            f"deadline_s={30 * 86400 + 1}",
        ],
    )
    async def test_bad_options_are_named(self, query: str) -> None:
        async with serving() as server:
            for path in ("/v1/jobs", "/v1/quote"):
                reply = await server.client.post(f"{path}?{query}", content=b"job")
                assert reply.status_code == 400
                assert error_of(reply)["kind"] == "ConfigError"
                assert query.split("=")[0] in error_of(reply)["message"]
            assert not server.service.runs

    async def test_job_files_are_bounded(self) -> None:
        async with serving() as server:
            limits = {
                "/v1/jobs": LIMITS.max_submission_bytes,
                "/v1/quote": LIMITS.max_job_bytes,
            }
            for path, limit in limits.items():
                at_limit = await server.client.post(path, content=bytes(limit))
                assert at_limit.is_success
                over = await server.client.post(path, content=bytes(limit + 1))
                assert over.status_code == 413
                assert error_of(over)["kind"] == "JobError"
            assert error_of(await server.client.post("/v1/jobs"))["exit_code"] == 5

    async def test_inputs_that_go_along_are_kept(self) -> None:
        async with serving() as server:
            body = encode_submission(Submission(b"job", (b"one", b"two")))
            run = (await server.client.post("/v1/jobs", content=body)).json()["id"]
            assert server.service.runs[run].body == b"job"
            for data in (b"one", b"two"):
                assert await server.service.store.get(address_of(data)) == data

    async def test_what_is_no_submission_is_named(self) -> None:
        async with serving() as server:
            body = encode_submission(Submission(b"job", (b"one",)))
            reply = await server.client.post("/v1/jobs", content=body[:-1])
            assert error_of(reply)["message"].startswith("not a valid job file: ")
            over = bytes(LIMITS.max_submission_bytes + 1)
            assert (await server.client.post("/v1/jobs", content=over)).status_code == 413
            assert not server.service.runs

    async def test_events_stream_until_the_last(self) -> None:
        async with serving() as server:
            run = await submit(server)
            story = server.service.runs[run]
            await story.tell("state", state="ranking")

            async def go_on() -> None:
                await story.tell("rows", rows=[{"step": 0, "values": {"loss": float("nan")}}])
                await story.tell("result", hash="ab", cost_nusd=1)

            async with server.client.stream("GET", f"/v1/jobs/{run}/events") as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                text = ""
                async for piece in response.aiter_text():
                    if "ranking" in piece:
                        await go_on()
                    text += piece
            events = [json.loads(line[6:]) for line in text.splitlines() if line[:6] == "data: "]
            assert [event["seq"] for event in events] == [1, 2, 3]
            assert events[1]["rows"][0]["values"]["loss"] == "NaN"
            assert "id: 3\nevent: result\n" in text

    async def test_events_that_come_together_leave_together(self) -> None:
        async with serving() as server:
            run = await submit(server)
            story = server.service.runs[run]
            async with server.client.stream("GET", f"/v1/jobs/{run}/events") as response:
                pieces = response.aiter_raw()
                assert await anext(pieces) == b": still here\n\n"  # with the headers
                for step in range(3):
                    await story.tell("progress", step=step, steps=3)
                assert (await anext(pieces)).count(b"data: ") == 3
                await story.tell("cancelled")
                assert (await anext(pieces)).count(b"data: ") == 1

    async def test_a_submission_can_bring_its_events(self) -> None:
        wanted = {"accept": "text/event-stream"}
        script = [("progress", {"step": 1, "steps": 1}), ("cancelled", {})]
        async with serving(MemoryService(script=script)) as server:
            reply = await server.client.post("/v1/jobs", content=b"job", headers=wanted)
            assert reply.status_code == 201
            told = [json.loads(line[6:]) for line in reply.text.splitlines() if "data: " in line]
            assert told[0] == {"id": "r-1"}
            assert [event["kind"] for event in told[1:]] == ["progress", "cancelled"]
            assert reply.text.count("id: ") == 2  # the opening has no number to resume after
            refused = await server.client.post("/v1/jobs", headers=wanted)
            assert error_of(refused)["kind"] == "JobError"
            bad = await server.client.post("/v1/jobs?wait_ms=x", content=b"job", headers=wanted)
            assert bad.status_code == 400
            assert list(server.service.runs) == ["r-1"]

    async def test_a_submission_tells_its_run_though_nothing_happens(self) -> None:
        async with serving() as server:
            wanted = {"accept": "text/event-stream"}
            for query in ("wait_ms=0", "wait_ms=200"):
                path = f"/v1/jobs?{query}"
                reply = await server.client.post(path, content=b"job", headers=wanted)
                assert reply.text.startswith('data: {"id":"r-')
                assert reply.text.count("data: ") == 1

    async def test_events_resume_after_what_was_seen(self) -> None:
        async with serving() as server:
            run = await submit(server)
            for step in range(3):
                await server.service.runs[run].tell("progress", step=step, steps=3)
            await server.service.runs[run].tell("cancelled")
            path = f"/v1/jobs/{run}/events"
            for text in (
                (await server.get(f"{path}?after=2")).text,
                (await server.get(path, last_event_id="2")).text,
            ):
                assert "id: 3\n" in text
                assert "id: 2\n" not in text
            assert (await server.get(f"{path}?after=x")).status_code == 400

    async def test_a_silent_stream_has_heartbeats_and_an_end(self) -> None:
        async with serving() as server:
            run = await submit(server)
            text = (await server.get(f"/v1/jobs/{run}/events?wait_ms=200")).text
            assert text.count(": still here") >= 2
            assert "data:" not in text

    async def test_a_stopping_node_ends_its_streams(self) -> None:
        async with serving() as server:
            run = await submit(server)
            async with server.client.stream("GET", f"/v1/jobs/{run}/events") as response:
                with trio.fail_after(2):
                    async for _ in response.aiter_raw():
                        server.stopping.set()

    async def test_cancel(self) -> None:
        async with serving() as server:
            run = await submit(server)
            reply = await server.client.post(f"/v1/jobs/{run}/cancel")
            assert reply.json()["state"] == "cancelled"

    @pytest.mark.parametrize("run", ["r-404", "..", "a b", "x" * 65])
    async def test_unknown_runs(self, run: str) -> None:
        async with serving() as server:
            for path in (f"/v1/jobs/{run}", f"/v1/jobs/{run}/events"):
                reply = await server.get(path)
                assert reply.status_code in (400, 404)
                assert error_of(reply)["kind"] == "ConfigError"
