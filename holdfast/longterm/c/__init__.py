"""C programs read as facts about their pointers: what porting to Checked C rests on."""
