"""Files that a command writes where the user wants them: local paths and fsspec URLs."""

from schemas.storage.store import Store


def split_url(url: str) -> tuple[Store, str]:
    """The folder of a file as a store, and the file's name in it."""
    folder, slash, name = url.rpartition("/")
    return Store((folder or "/") if slash else "."), name


def write_file(url: str, text: str) -> None:
    """Writes UTF-8 text atomically: readers see the old file or the complete new one.

    Raises:
        StoreError: the file cannot be written.
    """
    store, name = split_url(url)
    store.write_bytes(name, text.encode())
