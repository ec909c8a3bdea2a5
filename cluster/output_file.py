"""Writes a command's output files to local paths and fsspec URLs."""

from schemas.storage.store import Store


def split_url(url: str) -> tuple[Store, str]:
    """Splits the URL of a file into its folder, as a store, and its name."""
    folder, slash, name = url.rpartition("/")
    return Store((folder or "/") if slash else "."), name


def write_file(url: str, text: str) -> None:
    """Atomically writes UTF-8 text: readers see the old file or the complete new one.

    Raises:
        StoreError: the file cannot be written.
    """
    store, name = split_url(url)
    store.write_bytes(name, text.encode())
