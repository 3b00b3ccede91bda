"""What is on the disk: files and folders that appear whole or not at all, and files of others that are not believed."""

from .atomic import atomic_file, atomic_folder, lock_folder, sync_folder
from .json_objects import parse_object, read_json, write_json

__all__ = ["atomic_file", "atomic_folder", "lock_folder", "parse_object", "read_json", "sync_folder", "write_json"]
