"""The documentation site: complete navigation, no broken links, no requests to other hosts, readable on a phone."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("material", reason="pip install 'reslab[docs]'")
GENERATED = {"reference/config_keys.md", "changelog.md"}  # by scripts/docs_hook.py
WIDTHS = (1200, 420)


def leaves(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation."""
    for item in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(item, str):
            yield item
        else:
            yield from leaves(item)


def pages(repo: Path) -> set[str]:
    return {page.relative_to(repo / "docs").as_posix() for page in (repo / "docs").rglob("*.md")}


def test_every_page_is_in_the_navigation_once(repo: Path) -> None:
    listed = [*leaves(yaml.safe_load((repo / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])]
    assert len(listed) == len({*listed})
    assert {*listed} - GENERATED == pages(repo)


def test_every_page_has_one_title_and_commands_are_bash(repo: Path) -> None:
    for name in pages(repo):
        text = (repo / "docs" / name).read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        assert text.startswith("# ") and len(re.findall(r"^# ", prose, re.MULTILINE)) == 1, name
        assert not re.search(r"```\n(reslab|make|python|pip) ", text), f"{name}: a command needs ```bash"


def test_diagrams_are_up_to_date(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    import docs_diagrams

    for drawing in (docs_diagrams.study, docs_diagrams.batches, docs_diagrams.run):
        file = repo / "docs" / "assets" / f"{drawing.__name__}.svg"
        assert file.read_text(encoding="utf-8") == drawing(), "python scripts/docs_diagrams.py"


@pytest.mark.parametrize(
    "name", ["ablations.md", "statistics.md", pytest.param("reference/python.md", marks=pytest.mark.slow)]
)
def test_python_examples_run(repo: Path, name: str) -> None:
    variables: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (repo / "docs" / name).read_text(encoding="utf-8"), re.DOTALL):
        *_, last = block.strip().splitlines()
        exec(block, variables)
        value, _, expected = last.partition("  # ")
        if expected:
            value = value.removeprefix("print(").removesuffix(")") if value.startswith("print(") else value
            assert str(eval(value, variables)) == expected.strip('"'), last


@pytest.fixture(scope="module")
def site(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; broken links and anchors, and pages outside of the navigation, are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(repo / "src"), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_pages_name_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|source|iframe|link)\b[^>]*?(?:src|href)=[\"']?(https?:[^\"' >]+)", html)
        assert not loaded, f"{page.name} loads {loaded}"
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?:", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_all_config_keys_are_documented(site: Path) -> None:
    from reslab.keys import all_keys

    page = (site / "reference" / "config_keys.html").read_text(encoding="utf-8")
    missing = [row.short for row in all_keys() if f"<code>{row.short}</code>" not in page]
    assert not missing and page.count("<h3") > 20


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Serve the site on a free port of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_pages_fit_wide_and_narrow_screens_and_load_nothing_from_elsewhere(site: Path, address: str) -> None:
    playwright_api = pytest.importorskip("playwright.sync_api")
    requests: list[str] = []
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: requests.append(request.url))
            for file in sorted(site.rglob("*.html")):
                page.goto(f"{address}/{file.relative_to(site).as_posix()}")
                overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length")
                assert overflow <= 0 and not broken, f"{file.name} at {width} pixels: {overflow}, {broken} images"
        browser.close()
    assert [url for url in requests if not url.startswith((address, "data:"))] == []
