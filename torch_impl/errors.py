"""The errors that a user can mend, and those of memory."""


class InputError(Exception):
    """Something that the user gave is wrong. The message, one line, says what, and what to do."""


def is_out_of_memory(error):
    """Whether `error` says that memory ran out, of the machine or of a GPU, in either framework."""
    words = ("out of memory", "allocate memory", "unable to alloc", "bad_alloc")
    words += ("memory is overflow", "memoryallocation", "alloc_failed", "allocation_failed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
