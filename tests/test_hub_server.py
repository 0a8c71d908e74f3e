"""The local Hub server works with the real client: uploads come back unchanged, failures raise errors."""

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from .hub_server import LARGE, READER, WRITER, Commit, Repository

REPO = "somebody/things"


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo(REPO, private=True)
    return api


def test_small_and_large_files_are_downloaded_as_they_were_uploaded(hub, api, tmp_path):
    folder = tmp_path / "up"
    (folder / "inside").mkdir(parents=True)
    (folder / "small.txt").write_bytes(b"small")
    (folder / "inside" / "large.bin").write_bytes(bytes(range(256)) * LARGE)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="both")
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    down = snapshot_download(REPO, endpoint=hub.url, token=READER, local_dir=tmp_path / "down")
    for path in ("small.txt", "inside/large.bin"):
        assert (tmp_path / "down" / path).read_bytes() == (folder / path).read_bytes(), down
    assert [commit.title for commit in hub.repositories[REPO].history] == ["initial commit", "both"]


def test_an_existing_file_is_not_uploaded_again(hub, api):
    for path in ("a.bin", "b.bin"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x" * LARGE, path_in_repo=path)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    assert hub.files(REPO) == {"a.bin": b"x" * LARGE, "b.bin": b"x" * LARGE}


def test_long_listings_come_in_pages(hub, api):
    digest = hub.store(b"x")
    hub.repositories[REPO].history[-1].files |= {f"{index:03}.txt": digest for index in range(120)}
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 120


def test_missing_permissions_and_files_raise_the_clients_errors(hub, api):
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).model_info(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token=READER).upload_file(
            repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a"
        )
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nothing", endpoint=hub.url, token=READER)


@pytest.mark.parametrize("status", [429, 500, None])
def test_an_injected_failure_happens_once(hub, api, status):
    hub.fail("GET /api/whoami", times=1, status=status)
    with pytest.raises(Exception, match="rate limit|500|disconnected|reset|closed"):
        api.whoami()
    assert api.whoami()["name"] == "somebody"


def test_an_interrupted_download_resumes_where_it_stopped(hub, api):
    content = bytes(range(256)) * LARGE
    api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo="large.bin")
    hub.fail("GET .*/resolve/", half_way=True)
    with open(hf_hub_download(REPO, "large.bin", endpoint=hub.url, token=READER), "rb") as file:
        assert file.read() == content
    assert sum(request.startswith("GET") and "/resolve/" in request for request in hub.requests) == 2


def test_a_commit_is_all_or_nothing(hub, api):
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("not_there.txt", is_folder=False)]
    with pytest.raises(BadRequestError, match="nothing was committed"):
        api.create_commit(REPO, operations, commit_message="half")
    assert hub.files(REPO) == {} and len(hub.repositories[REPO].history) == 1


def test_a_commit_adds_and_removes_at_once(hub, api):
    api.create_commit(REPO, [CommitOperationAdd(f"{name}/x", b"x") for name in "ab"], commit_message="two")
    operations = [CommitOperationAdd("c/x", b"c"), CommitOperationDelete("a/", is_folder=True)]
    commit = api.create_commit(REPO, operations, commit_message="one more")
    assert hub.files(REPO, commit.oid) == {"b/x": b"x", "c/x": b"c"}
    assert set(hub.files(REPO, hub.repositories[REPO].history[-2].oid)) == {"a/x", "b/x"}


def test_a_dataset_is_listed_by_folder_and_downloaded(hub, api, tmp_path):
    files = {"README.md": b"# Things", "data/train.parquet": b"PAR1", "data/more/test.parquet": b"PAR2"}
    commit = Commit("1" * 40, "put", {path: hub.store(content) for path, content in files.items()})
    hub.repositories[f"datasets/{REPO}"] = Repository(private=False, branches={"main": [commit]})
    options = {"repo_type": "dataset"}
    top = {entry.path for entry in api.list_repo_tree(REPO, **options)}
    assert top == {"README.md", "data"}
    inside = {entry.path for entry in api.list_repo_tree(REPO, "data", recursive=True, **options)}
    assert inside == set(files) - {"README.md"}
    kinds = {
        entry.path: type(entry).__name__ for entry in api.get_paths_info(REPO, ["data", "gone"], **options)
    }
    assert kinds == {"data": "RepoFolder"}
    path = hf_hub_download(REPO, "data/train.parquet", endpoint=hub.url, local_dir=tmp_path, **options)
    with open(path, "rb") as file:
        assert file.read() == b"PAR1"
