"""Teachers: what turns token ids into labels, behind one protocol (``labeler.teachers.base``)."""
