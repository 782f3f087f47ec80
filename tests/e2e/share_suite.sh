# What programs expect of a file system, as a shell finds it in the directory $1. Each line that fails names
# itself. With `guest` as $2 it is a guest's mount, whose files have one owner.
cd "$1" || exit 1
t() { if eval "$2"; then :; else echo "FAILED: $1"; fi; }
no() { if eval "$2" 2>/dev/null; then echo "FAILED: $1"; fi; }
echo hello > a; t write '[ "$(cat a)" = hello ]'
echo more >> a; t append '[ "$(wc -l < a)" = 2 ]'
: > a; t truncate '[ ! -s a ]'
chmod 600 a; t chmod '[ "$(stat -c %a a)" = 600 ]'
touch -d @1000000000 a; t mtime '[ "$(stat -c %Y a)" = 1000000000 ]'
mkdir d; t mkdir '[ -d d ]'
no mkdir_twice 'mkdir d'
no rmdir_of_nothing 'rmdir nothing'
echo x > d/x; no rmdir_of_a_full_directory 'rmdir d'
mv d/x d/y; t rename '[ -e d/y ] && [ ! -e d/x ]'
mv d e; t rename_directory '[ -e e/y ]'
ln e/y h; t hard_link '[ "$(stat -c %h h)" = 2 ] && [ h -ef e/y ]'
rm h; t unlink '[ ! -e h ] && [ "$(stat -c %h e/y)" = 1 ] && [ "$(cat e/y)" = x ]'
ln -s e/y s; t symbolic_link '[ "$(readlink s)" = e/y ] && [ "$(cat s)" = x ]'
ln -s nowhere n; t dangling '[ -L n ] && [ ! -e n ]'
exec 5<>o; echo open >&5; rm o; t unlinked_while_open '[ ! -e o ] && echo still >&5'; exec 5>&-
dd if=/dev/zero of=z bs=1k count=0 seek=64 2>/dev/null; t sparse '[ "$(stat -c %s z)" = 65536 ]'
dd if=/dev/urandom of=r bs=64k count=40 2>/dev/null; cp r r2; t copy 'cmp -s r r2'
[ "$2" = guest ] && sync && echo 3 > /proc/sys/vm/drop_caches
t read_again 'cmp -s r r2'
i=0; while [ $i -lt 100 ]; do : > f$i; i=$((i+1)); done; set -- "$1" "$2" f*; found=$#; t list '[ $found = 102 ]'
rm f*; t list_nothing '[ "$(echo f*)" = "f*" ]'
no a_pipe 'mkfifo p'
[ "$2" = guest ] && no a_foreign_owner 'chown 4242 a'
rm -r e a s n z r r2; t all_gone '[ "$(echo *)" = "*" ]'
echo SUITE-DONE
