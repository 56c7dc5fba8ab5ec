"""How every run starts, resumes, trains, is planned and ends."""
