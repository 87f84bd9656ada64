"""Hook of mkdocs.yml: add CHANGELOG.md, from the root of the repository, to the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add CHANGELOG.md as changelog.md, with its links relative to docs/."""
    changelog = Path(config.config_file_path).parent / "CHANGELOG.md"
    if changelog.exists():
        text = changelog.read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, "changelog.md", content=text))
    return files
