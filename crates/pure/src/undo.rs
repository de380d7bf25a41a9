#[path = "../../../src/undo/restore/net_change.rs"]
pub mod net;
