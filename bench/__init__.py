"""One command for each published figure; results/ keeps what they measured, with machine and versions."""
