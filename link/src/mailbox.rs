//! The way from a machine's threads to their role's loop: one queue, in the order in which things happened.
//!
//! Threads wait while the loop is behind. The loop posts to itself what happens on its own thread, so that it
//! keeps its place among the rest; that never waits. Decides nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The end of those who have something to tell.
#[derive(Debug)]
pub struct Sender<E>(Arc<Shared<E>>);

/// The loop's end.
#[derive(Debug)]
pub struct Receiver<E> {
    shared: Arc<Shared<E>>,
    /// Taken from the queue in one go.
    taken: VecDeque<E>,
}

#[derive(Debug)]
struct Shared<E> {
    queue: Mutex<Queue<E>>,
    limit: usize,
    room: Condvar,
    arrived: Notify,
}

#[derive(Debug)]
struct Queue<E> {
    events: VecDeque<E>,
    /// Nobody will take them.
    closed: bool,
}

/// Makes a mailbox in which threads may leave `limit` events.
#[must_use]
pub fn mailbox<E>(limit: usize) -> (Sender<E>, Receiver<E>) {
    let shared = Arc::new(Shared {
        queue: Mutex::new(Queue {
            events: VecDeque::new(),
            closed: false,
        }),
        limit,
        room: Condvar::new(),
        arrived: Notify::new(),
    });
    let sender = Sender(Arc::clone(&shared));
    let taken = VecDeque::new();
    (sender, Receiver { shared, taken })
}

impl<E> Sender<E> {
    /// Tells the loop, from a thread that may wait until there is room. Once the loop has ended the event is forgotten.
    pub fn send(&self, event: E) {
        let full = |queue: &mut Queue<E>| !queue.closed && queue.events.len() >= self.0.limit;
        let queue = self
            .0
            .room
            .wait_while(self.0.queue(), full)
            .unwrap_or_else(PoisonError::into_inner);
        self.0.push(queue, event);
    }

    /// Tells the loop without waiting, however much there is: for what happens on the loop's own thread.
    pub fn post(&self, event: E) {
        self.0.push(self.0.queue(), event);
    }
}

impl<E> Clone for Sender<E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<E> Receiver<E> {
    /// Waits for the next event. Nothing is lost if the wait is given up.
    pub async fn recv(&mut self) -> E {
        loop {
            if let Some(event) = self.try_recv() {
                return event;
            }
            self.shared.arrived.notified().await;
        }
    }

    /// Returns the next event if there is one already.
    pub fn try_recv(&mut self) -> Option<E> {
        if self.taken.is_empty() {
            let mut queue = self.shared.queue();
            std::mem::swap(&mut self.taken, &mut queue.events);
            if self.taken.len() >= self.shared.limit {
                self.shared.room.notify_all();
            }
        }
        self.taken.pop_front()
    }
}

impl<E> Drop for Receiver<E> {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.closed = true;
        queue.events.clear();
        self.shared.room.notify_all();
    }
}

impl<E> Shared<E> {
    fn push(&self, mut queue: MutexGuard<'_, Queue<E>>, event: E) {
        if queue.closed {
            return;
        }
        queue.events.push_back(event);
        let first = queue.events.len() == 1;
        drop(queue);
        // With others before it the loop has been told.
        if first {
            self.arrived.notify_one();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue<E>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn events_of_all_threads_come_each_in_its_order() {
        let (sender, mut receiver) = mailbox(7);
        let threads: Vec<_> = (0..3_usize)
            .map(|thread| {
                let sender = sender.clone();
                std::thread::spawn(move || (0..2_000_usize).for_each(|number| sender.send((thread, number))))
            })
            .collect();
        let mut next = [0; 4];
        for round in 0..8_000 {
            if round % 4 == 0 {
                sender.post((3, round / 4));
            }
            let (thread, number) = receiver.recv().await;
            assert_eq!(number, next[thread]);
            next[thread] += 1;
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(receiver.try_recv(), None);
    }

    #[tokio::test]
    async fn a_wait_that_is_given_up_loses_nothing() {
        let (sender, mut receiver) = mailbox(4);
        for number in 0..100 {
            let given_up = tokio::time::timeout(std::time::Duration::ZERO, receiver.recv()).await;
            assert!(given_up.is_err());
            sender.post(number);
            assert_eq!(receiver.recv().await, number);
        }
    }

    #[test]
    fn the_end_of_the_loop_lets_go_of_those_who_wait() {
        let (sender, receiver) = mailbox(1);
        sender.send(1);
        let waits = std::thread::spawn({
            let sender = sender.clone();
            move || sender.send(2)
        });
        drop(receiver);
        waits.join().unwrap();
        sender.send(3);
        sender.post(4);
    }

    #[test]
    fn what_the_loop_tells_itself_needs_no_room() {
        let (sender, mut receiver) = mailbox(2);
        (0..10).for_each(|number| sender.post(number));
        assert_eq!(
            std::iter::from_fn(|| receiver.try_recv()).collect::<Vec<_>>(),
            (0..10).collect::<Vec<_>>()
        );
    }
}
