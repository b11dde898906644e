//! A thread that takes orders one after the other: where a role's slow work is done.
//!
//! Orders are obeyed in the order in which they were given. The thread ends after the last order that was
//! given before its handle was dropped or joined. It decides nothing.

use core::ops::ControlFlow;
use std::io;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

/// Handle of a thread that takes orders of kind `C` and ends with a `T`.
#[derive(Debug)]
pub struct Worker<C, T = ()> {
    orders: Orders<C>,
    thread: Option<JoinHandle<T>>,
}

/// Gives orders to a [`Worker`]; does not keep it alive.
#[derive(Debug)]
pub struct Orders<C>(mpsc::Sender<Option<C>>);

/// The thread's end.
#[derive(Debug)]
pub struct Inbox<C>(mpsc::Receiver<Option<C>>);

impl<C: Send + 'static, T: Send + 'static> Worker<C, T> {
    /// Starts a thread of that name.
    ///
    /// # Errors
    /// Fails if the host refuses a thread.
    pub fn spawn(name: &str, run: impl FnOnce(Inbox<C>) -> T + Send + 'static) -> io::Result<Self> {
        let (orders, inbox) = mpsc::channel();
        let thread = Builder::new().name(name.to_owned()).spawn(move || run(Inbox(inbox)))?;
        Ok(Self {
            orders: Orders(orders),
            thread: Some(thread),
        })
    }

    /// Gives an order. One that comes after the thread's end is forgotten: the thread has told why it ended.
    pub fn send(&self, order: C) {
        self.orders.send(order);
    }

    /// Returns another way to give orders.
    #[must_use]
    pub fn orders(&self) -> Orders<C> {
        self.orders.clone()
    }

    /// Waits until all orders given so far are done, and returns what the thread ended with; nothing if it panicked.
    pub fn join(mut self) -> Option<T> {
        self.orders.stop();
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl<C, T> Drop for Worker<C, T> {
    fn drop(&mut self) {
        self.orders.stop();
    }
}

impl<C> Orders<C> {
    /// Gives an order; see [`Worker::send`].
    pub fn send(&self, order: C) {
        let _ = self.0.send(Some(order));
    }

    fn stop(&self) {
        let _ = self.0.send(None);
    }
}

impl<C> Clone for Orders<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C> Inbox<C> {
    /// Waits for the next order; `None` when the thread is to end.
    #[must_use]
    pub fn next(&self) -> Option<C> {
        self.0.recv().ok().flatten()
    }

    /// Returns the next order if there is one; `Break` when the thread is to end.
    pub fn poll(&self) -> ControlFlow<(), Option<C>> {
        match self.0.try_recv() {
            Ok(Some(order)) => ControlFlow::Continue(Some(order)),
            Err(mpsc::TryRecvError::Empty) => ControlFlow::Continue(None),
            Ok(None) | Err(mpsc::TryRecvError::Disconnected) => ControlFlow::Break(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summing() -> Worker<u64, u64> {
        let sum = |inbox: Inbox<u64>| std::iter::from_fn(|| inbox.next()).sum();
        Worker::spawn("sum", sum).unwrap()
    }

    #[test]
    fn every_order_given_before_the_end_is_obeyed() {
        let worker = summing();
        for order in 1..=100 {
            worker.send(order);
        }
        assert_eq!(worker.join(), Some(5050));
    }

    #[test]
    fn an_inbox_can_be_looked_at() {
        let (orders, inbox) = mpsc::channel();
        let (orders, inbox) = (Orders(orders), Inbox(inbox));
        assert_eq!(inbox.poll(), ControlFlow::Continue(None));
        orders.send(7);
        assert_eq!(inbox.poll(), ControlFlow::Continue(Some(7)));
        orders.stop();
        assert_eq!(inbox.poll(), ControlFlow::Break(()));
        drop(orders);
        assert_eq!(inbox.poll(), ControlFlow::<(), Option<u8>>::Break(()));
    }

    #[test]
    fn another_giver_of_orders_does_not_keep_the_thread_alive() {
        let worker = summing();
        let orders = worker.orders();
        orders.send(7);
        assert_eq!(worker.join(), Some(7));
        orders.send(1);
    }
}
