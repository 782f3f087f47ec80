//! A doorbell as loom sees it: an eventfd.

use loom::sync::{Arc, Condvar, Mutex};

#[derive(Debug, Clone, Default)]
pub(super) struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    pub(super) fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    /// Sleeps until it rings. Loom reports a deadlock when it never does.
    pub(super) fn wait(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}
