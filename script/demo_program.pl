# The demo's program: an index of which package each of Perl's own modules defines.
#
# Every module of the system's Perl is read, split into lines, and dropped again; only the package names stay. What is to
# be found: the lines are freed, yet much of the memory stays resident, because the few small strings that are kept lie
# between them and pin the pages around.
use strict;
use warnings;

my @files;
my @folders = grep { -d } '/usr/share/perl', '/usr/lib/x86_64-linux-gnu/perl-base', '/usr/share/perl5';
while (defined(my $folder = shift @folders)) {
    opendir my $entries, $folder or next;
    for my $name (sort grep { !/^\./ } readdir $entries) {
        my $path = "$folder/$name";
        next if -l $path;
        push @folders, $path if -d $path;
        push @files, $path if -f $path && $name =~ /\.p[ml]$/;
    }
}
@files = @files[0 .. 299] if @files > 300;

my (%index, $lines);
my @recent;    # the last few modules stay in memory for a while, as a cache would keep them
for my $path (@files) {
    open my $file, '<', $path or next;
    my @text = <$file>;
    $lines += @text;
    push @{ $index{$path} }, map { /^package\s+([\w:]+)/ ? "$1" : () } @text;
    push @recent, \@text;
    shift @recent if @recent > 40;
}
@recent = ();
printf STDERR "%d modules, %d lines, %d packages\n", scalar @files, $lines, scalar map { @$_ } values %index;
