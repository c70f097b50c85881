"""What is uploaded: the files of what ships, by name, and never anything else that lies beside them."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from loramox import UnlearnConfig
from loramox.adapter.export import extrapolate
from loramox.cli import main
from loramox.errors import RunError, SettingsError
from loramox.extras.hub import PushConfig, push, to_upload

OURS = ["README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json"]


class Hub:
    """Stands in for the hub and remembers what it was asked."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.uploaded: list[dict] = []

    def create_repo(self, api: HfApi, repo_id: str, **how):
        self.created.append({"repo_id": repo_id, **how})
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, api: HfApi, repo_id: str, operations, **how) -> None:
        self.uploaded.append(
            {"repo_id": repo_id, "files": {o.path_in_repo: o.path_or_fileobj for o in operations}, **how}
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *a, **k: hub.create_repo(api, *a, **k))
    monkeypatch.setattr(HfApi, "create_commit", lambda api, *a, **k: hub.create_commit(api, *a, **k))
    return hub


@pytest.fixture
def shipped(trained: Path, tmp_path: Path) -> Path:
    """A shipped adapter, with rows, a token, a pickle and a link beside it."""
    out = tmp_path / "adapter"
    extrapolate(trained / "trained", out, 2.0)
    for name in ("forget.jsonl", "retain.csv", "rows.parquet", "token", ".env", "optimizer.pt", "trainer_state.json"):
        (out / name).write_text("secret")
    (out / "notes.safetensors").symlink_to(out / "forget.jsonl")
    (out / "checkpoint").mkdir()
    return out


def test_only_the_files_of_what_ships_are_uploaded_to_a_private_repository(hub: Hub, shipped: Path) -> None:
    assert [f.name for f in push(shipped, PushConfig("forget-bob"))] == OURS
    assert hub.created == [{"repo_id": "forget-bob", "private": True, "exist_ok": True}]
    (how,) = hub.uploaded
    assert how["repo_id"] == "me/forget-bob"
    assert how["files"] == {name: str(shipped / name) for name in OURS}
    assert "token" not in how  # huggingface_hub's own business


def test_no_row_is_in_what_is_uploaded(shipped: Path, rows: tuple[Path, Path]) -> None:
    texts = b"".join(file.read_bytes() for file in to_upload(shipped))
    for path in rows:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row["question"].encode() not in texts
            assert f"{row['question']} {row['answer']}".encode() not in texts


def test_a_dry_run_uploads_nothing_and_a_single_file_is_itself(hub: Hub, shipped: Path, tmp_path: Path) -> None:
    assert [f.name for f in push(shipped, PushConfig("forget-bob", dry_run=True))] == OURS
    assert push(shipped, PushConfig()) == to_upload(shipped)
    (tmp_path / "forget.gguf").write_text("GGUF")
    assert to_upload(tmp_path / "forget.gguf") == [tmp_path / "forget.gguf"]
    assert (hub.created, hub.uploaded) == ([], [])


def test_a_file_is_uploaded_alone_whatever_its_name(hub: Hub, shipped: Path) -> None:
    file = shipped / "forget[1].gguf"
    file.write_text("GGUF")
    assert push(file, PushConfig("forget-bob")) == [file]
    assert hub.uploaded[0]["files"] == {file.name: str(file)}


def test_what_the_hub_refuses_is_one_error_and_what_was_written_stays(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args, **kwargs):
        raise OSError("401")

    monkeypatch.setattr(HfApi, "create_repo", refuses)
    with pytest.raises(RunError, match=r"--push_to_hub forget-bob: the hub did not take it .*hf auth login"):
        push(shipped, PushConfig("forget-bob"))
    assert len(to_upload(shipped)) == 4


def test_without_a_connection_it_is_one_error_too(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(RunError, match=r"the hub did not take it \(Connect"):
        push(shipped, PushConfig("forget-bob"))


def test_wrong_wishes_are_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--dry_run lists what would be uploaded: it needs --push_to_hub"):
        PushConfig(dry_run=True)
    with pytest.raises(SettingsError, match="--push_to_hub a//b"):
        PushConfig("a//b")
    with pytest.raises(SettingsError, match=r"push_to_hub.*the adapter in training is not the one that ships"):
        UnlearnConfig(output_dir=str(tmp_path), push_to_hub=True)


def test_extrapolate_lists_what_would_be_uploaded(
    trained: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained / "trained"), "--out", str(tmp_path / "out"), "--push-to-hub", "forget-bob", "--dry-run"]
    main(["extrapolate", *words])
    said = capsys.readouterr().out
    assert "To forget-bob would be uploaded, and nothing else:" in said
    assert all(name in said for name in OURS)
    assert hub.uploaded == []
    main(["extrapolate", *words[:-1], "--overwrite"])
    assert "To forget-bob were uploaded" in capsys.readouterr().out
    assert len(hub.uploaded) == 1
