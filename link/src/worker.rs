//! A thread that takes orders one after the other: where a role's slow work is done.
//!
//! Orders are obeyed in the order in which they were given. The thread ends after the last order that was
//! given before its handle was dropped or joined. It decides nothing.

use core::ops::ControlFlow;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// Handle of a thread that takes orders of kind `C` and ends with a `T`.
#[derive(Debug)]
pub struct Worker<C, T = ()> {
    orders: Orders<C>,
    thread: Option<JoinHandle<T>>,
}

/// Gives orders to a [`Worker`]; does not keep it alive.
#[derive(Debug)]
pub struct Orders<C>(Arc<Shared<C>>);

/// The thread's end.
#[derive(Debug)]
pub struct Inbox<C>(Arc<Shared<C>>);

#[derive(Debug)]
struct Shared<C> {
    queue: Mutex<Queue<C>>,
    arrived: Condvar,
}

#[derive(Debug)]
struct Queue<C> {
    orders: VecDeque<C>,
    /// Nothing more is taken.
    closed: bool,
    /// The thread waits.
    waiting: bool,
}

impl<C: Send + 'static, T: Send + 'static> Worker<C, T> {
    /// Starts a thread of that name.
    ///
    /// # Errors
    /// Fails if the host refuses a thread.
    pub fn spawn(name: &str, run: impl FnOnce(Inbox<C>) -> T + Send + 'static) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let thread = Builder::new().name(name.to_owned()).spawn(move || run(inbox))?;
        Ok(Self {
            orders,
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

fn channel<C>() -> (Orders<C>, Inbox<C>) {
    let shared = Arc::new(Shared {
        queue: Mutex::new(Queue {
            orders: VecDeque::new(),
            closed: false,
            waiting: false,
        }),
        arrived: Condvar::new(),
    });
    (Orders(Arc::clone(&shared)), Inbox(shared))
}

impl<C> Orders<C> {
    /// Gives an order; see [`Worker::send`].
    pub fn send(&self, order: C) {
        let mut queue = self.0.queue();
        if !queue.closed {
            queue.orders.push_back(order);
            self.0.tell(queue);
        }
    }

    fn stop(&self) {
        let mut queue = self.0.queue();
        queue.closed = true;
        self.0.tell(queue);
    }
}

impl<C> Clone for Orders<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C> Inbox<C> {
    /// Waits for the next order; `None` when the thread is to end.
    #[must_use]
    pub fn next(&self) -> Option<C> {
        let mut queue = self.0.queue();
        while queue.orders.is_empty() && !queue.closed {
            queue.waiting = true;
            queue = self.0.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.orders.pop_front()
    }

    /// Returns the next order if there is one; `Break` when the thread is to end.
    pub fn poll(&self) -> ControlFlow<(), Option<C>> {
        let mut queue = self.0.queue();
        match queue.orders.pop_front() {
            None if queue.closed => ControlFlow::Break(()),
            order => ControlFlow::Continue(order),
        }
    }
}

impl<C> Drop for Inbox<C> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.closed = true;
        queue.orders.clear();
    }
}

impl<C> Shared<C> {
    fn queue(&self) -> MutexGuard<'_, Queue<C>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread if it waits: after the lock is free, or it would wait for that next.
    fn tell(&self, mut queue: MutexGuard<'_, Queue<C>>) {
        let is_awaited = std::mem::take(&mut queue.waiting);
        drop(queue);
        if is_awaited {
            self.arrived.notify_one();
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
        let (orders, inbox) = channel();
        assert_eq!(inbox.poll(), ControlFlow::Continue(None));
        orders.send(7);
        assert_eq!(inbox.poll(), ControlFlow::Continue(Some(7)));
        orders.stop();
        assert_eq!(inbox.poll(), ControlFlow::Break(()));
        orders.send(8_u8);
        assert_eq!(
            inbox.poll(),
            ControlFlow::Break(()),
            "what is given after the end is forgotten"
        );
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
