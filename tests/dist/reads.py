"""How many bytes a rank reads of safetensors files."""
from xtf.hf import safetensors as files


def counting(calls, mp):
    """Note how many bytes each read returns: reads, and boxes of memory maps."""
    read, mapped = files._read, files._mapped

    def counted(file, position, view):
        read(file, position, view)
        calls.append(len(view))

    class Boxes:
        def __init__(self, entry):
            self.whole = mapped(entry)

        def __getitem__(self, box):
            calls.append(self.whole[box].nbytes)
            return self.whole[box]
    mp.setattr(files, "_read", counted)
    mp.setattr(files, "_mapped", Boxes)
