#[path = "../../../src/undo/net.rs"]
pub mod net;
